"""A real ``realm serve`` in a process of its own, for benchmarks that watch it from outside."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from realm.bench.clients import LIMITS

REPOSITORY = Path(__file__).resolve().parents[2]


@contextlib.contextmanager
def server(
    home: Path, model: Path, *, limits: dict[str, int] | None = None, **settings: int
) -> Iterator[tuple[str, str, int]]:
    """A server with a fresh registry: its URL, admin key and process id.

    ``limits`` go before the host's defaults of every tenant's limits; None lifts those that could be met.
    """
    (home / "models").mkdir(parents=True)
    (home / "models" / model.name).symlink_to(model)
    program = (
        "import asyncio, json, sys, pathlib\n"
        "from realm.serve import serve\n"
        "from realm.settings import ServeSettings\n"
        "def ready(info): print(json.dumps([info.url, info.admin_key]), flush=True)\n"
        "chosen = json.loads(sys.argv[3])\n"
        "settings = ServeSettings(home=pathlib.Path(sys.argv[1]), model=sys.argv[2], port=0, **chosen)\n"
        "asyncio.run(serve(settings, on_ready=ready))\n"
    )
    chosen = json.dumps({"defaults": LIMITS if limits is None else limits, **settings})
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(home), model.name, chosen], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise SystemExit("the server did not start; its messages are above")
        url, key = json.loads(line)
        yield url, key, process.pid
    finally:
        process.terminate()
        process.wait(30)
