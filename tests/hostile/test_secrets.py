"""Run last: what all the other tests made the server write, and what must not be in it."""

from __future__ import annotations

import re
from pathlib import Path

from tests.hostile.stage import PROMPT, Stage
from tests.hostile.test_isolation import SECRET


def _secrets(stage: Stage) -> dict[str, str]:
    return {
        "the admin's key": stage.admin_key,
        **{f"the key of {tenant}": key for tenant, key in stage.keys.items()},
        "the neighbour's prompt": PROMPT,
        "a part of the neighbour's prompt": "marmalade-lighthouse",
        "the neighbour's text": "".join(stage.reference),
        "what a guest stored": SECRET,
        "what a guest logged": "all is lost",
    }


def test_the_servers_log_has_no_keys_and_no_prompts(stage: Stage) -> None:
    log = stage.log.read_text(errors="replace")
    assert "the engine serves" in log
    found = [name for name, secret in _secrets(stage).items() if secret in log]
    assert not found


def test_the_servers_log_has_no_failure_of_the_host(stage: Stage) -> None:
    """Whatever guests did, nothing of the host fell over: every exception it did not expect is in its log."""
    log = stage.log.read_text(errors="replace")
    assert not re.search(r"Traceback|\bERROR\b|\bCRITICAL\b|failed; its guest is ended", log), log[-4000:]


def test_keys_are_not_in_the_servers_files(stage: Stage) -> None:
    keys = [stage.admin_key.encode(), *(key.encode() for key in stage.keys.values())]
    files = [path for path in stage.home.rglob("*") if path.is_file() and "models" not in path.parts]
    assert any(path.stat().st_size > 4096 for path in files)
    found = [path for path in files if any(key in path.read_bytes() for key in keys)]
    assert not found


def test_the_servers_files_are_its_users_alone(stage: Stage) -> None:
    def open_to_others(path: Path) -> bool:
        return bool(path.stat().st_mode & 0o077)

    assert not open_to_others(stage.home)
    assert not [path for path in stage.home.iterdir() if path.name == "cache" and open_to_others(path)]
