"""``realm serve``, ``realm doctor`` and the demo: commands that need the host's own packages."""

from __future__ import annotations

import asyncio
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer

from realm.cli.terminal import err, out, status
from realm.engine.options import MOST_AHEAD, EngineOptions
from realm.settings import DEFAULT_HOST, DEFAULT_PORT, ServeSettings, default_home, default_workers

if TYPE_CHECKING:
    from realm.serve import ServeInfo

_ENGINE = EngineOptions()


def serve(
    model: Annotated[str, typer.Option(help="The model to serve.", show_default="the only one there is")] = "",
    host: Annotated[str, typer.Option(help="Address to listen on.")] = DEFAULT_HOST,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 takes a free one.")] = DEFAULT_PORT,
    tls_cert: Annotated[
        Path | None, typer.Option("--tls-cert", dir_okay=False, help="Certificate (with its chain) as a PEM file.")
    ] = None,
    tls_key: Annotated[
        Path | None, typer.Option("--tls-key", dir_okay=False, help="The certificate's key as a PEM file.")
    ] = None,
    allow_plaintext: Annotated[
        bool, typer.Option("--allow-plaintext", help="Let other machines connect without TLS: keys can be read.")
    ] = False,
    workers: Annotated[
        int | None,
        typer.Option(
            min=1, max=256, help="Guest worker processes.", show_default="half of the processors; with a GPU, all but 3"
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, or auto: a GPU where there is one.")] = _ENGINE.device,
    dtype: Annotated[str, typer.Option(help="bfloat16 or float32.")] = _ENGINE.dtype,
    attention: Annotated[str, typer.Option(help="sdpa, triton, or auto: the device's.")] = _ENGINE.attention,
    kv_pages: Annotated[int, typer.Option(min=0, help="KV pages of 16 tokens; 0 sizes by free memory.")] = 0,
    kv_fraction: Annotated[
        float, typer.Option(help="Part of the GPU's memory for KV pages, of what the model leaves.")
    ] = _ENGINE.kv_fraction,
    adapter_memory: Annotated[
        int, typer.Option(min=-1, help="MiB for adapters in use; 0 is the device's default, -1 does without adapters.")
    ] = _ENGINE.adapter_memory,
    adapter_cache: Annotated[
        int, typer.Option(min=-1, help="MiB of main memory for others; 0 is the device's default, -1 none.")
    ] = _ENGINE.adapter_cache,
    token_budget: Annotated[
        int, typer.Option(min=0, help="Most tokens of one engine step; 0 is 512 on a CPU, 8192 on a GPU.")
    ] = 0,
    max_sequences: Annotated[int, typer.Option(min=0, help="Most sequences of one engine step; 0 is 256.")] = 0,
    run_ahead: Annotated[
        int,
        typer.Option(min=-1, max=MOST_AHEAD, help="Steps launched before guests answer; -1 is 1 on a CPU, 2 on a GPU."),
    ] = -1,
    threads: Annotated[int, typer.Option(min=0, help="The engine's threads; 0 is torch's default.")] = 0,
    random_weights: Annotated[bool, typer.Option("--random-weights", hidden=True)] = False,
    json: Annotated[bool, typer.Option("--json", help="Say what is ready as one line of JSON.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log what happens.")] = False,
) -> None:
    """Start a server: gateway, guest workers and the engine. Ctrl-C drains and ends it."""
    from realm.serve import serve as run_server

    logging.basicConfig(
        level=logging.INFO if verbose else logging.WARNING,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        stream=sys.stderr,
    )
    settings = ServeSettings(
        model=model,
        host=host,
        port=port,
        tls_cert=tls_cert,
        tls_key=tls_key,
        allow_plaintext=allow_plaintext,
        workers=workers or default_workers(device),
        engine=EngineOptions(
            device=device,
            dtype=dtype,
            attention=attention,
            pages=kv_pages,
            kv_fraction=kv_fraction,
            adapter_memory=adapter_memory,
            adapter_cache=adapter_cache,
            token_budget=token_budget,
            max_sequences=max_sequences,
            run_ahead=run_ahead,
            threads=threads,
            random_weights=random_weights,
        ),
    )
    waiting = status(f"starting (data in {settings.home})")
    waiting.__enter__()

    def ready(info: ServeInfo) -> None:
        waiting.__exit__(None, None, None)
        if json:
            line = {"url": info.url, "home": str(info.home), "model": info.model, "admin_key": info.admin_key}
            sys.stdout.write(msgspec.json.encode(line).decode() + "\n")
            sys.stdout.flush()
        else:
            _announce(info)

    try:
        asyncio.run(run_server(settings, on_ready=ready))
    finally:
        waiting.__exit__(None, None, None)


def _announce(info: ServeInfo) -> None:
    console = out()
    console.print(f"Realm serves {info.model}")
    console.print(f"  url   {info.url}")
    console.print(f"  data  {info.home}")
    if info.admin_key is not None:
        console.print(f"  key   {info.admin_key}")
        console.print("The key is the admin's, and shown this once: save it (`realm login` does).")


def doctor(
    port: Annotated[int, typer.Option(min=1, max=65535, help="The port that serve would use.")] = DEFAULT_PORT,
) -> None:
    """Check whether this machine can serve, and say what to do where it cannot."""
    from realm.cli.doctor import FAILED, examine

    console = out()
    failed = False
    for finding in examine(default_home(), port):
        failed |= finding.state == FAILED
        console.print(finding.line())
    if failed:
        err().print("something must be mended first")
        raise typer.Exit(1)


def demo(
    guests: Annotated[
        Path, typer.Option(exists=True, file_okay=False, help="The folder with the guests' sources and modules.")
    ] = Path("guest_modules"),
    max_tokens: Annotated[int, typer.Option(min=8, max=1024, help="Most tokens of the chat.")] = 160,
) -> None:
    """Three tenants, three guests, one model: what `make demo` runs."""
    from realm.cli.demo import run_demo

    if not run_demo(guests, max_tokens):
        raise typer.Exit(1)
