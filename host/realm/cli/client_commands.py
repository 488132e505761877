"""Commands that ask a server: push, ps, logs, cancel, generate, login, modules."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from realm.cli.connection import DEFAULT_URL, KeyOption, Login, UrlOption, connect, save_login
from realm.cli.terminal import err, out, printable, show_error, size, status, table, upload_bar, usage_line, when, write
from realm_sdk import RealmError, RunInfo, SyncClient

_WIDE = 120
"""Columns that a terminal needs for all that `realm ps` can show."""

modules_app = typer.Typer(help="Your modules on the server.", no_args_is_help=True)


def push(
    file: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="A guest: a .wasm file.")],
    name: Annotated[str | None, typer.Option(help="What to call it.", show_default="the file's name")] = None,
    url: UrlOption = None,
    key: KeyOption = None,
) -> None:
    """Store a guest on the server under a name."""
    with connect(url, key) as client, upload_bar() as progress:
        module = client.push(name or file.stem, file, progress)
    out().print(f"{module.name} version {module.version}: {size(module.size)}, sha256 {module.sha256[:16]}…")


def ps(
    all: Annotated[bool, typer.Option("--all", "-a", help="Finished runs, too.")] = False,
    limit: Annotated[int, typer.Option(min=1, max=1000, help="Most runs to list.")] = 50,
    url: UrlOption = None,
    key: KeyOption = None,
) -> None:
    """List your runs."""
    with connect(url, key) as client:
        runs = client.ps(all=all, limit=limit).runs
    console = out()
    if runs:
        console.print(_runs(runs, narrow=console.width < _WIDE))
    else:
        console.print("no runs" if all else "no runs in progress (--all shows finished ones)")


def _runs(runs: list[RunInfo], *, narrow: bool) -> Table:
    """A narrow table leaves out when the runs began and rounds their fuel to millions."""
    numbers = ("SECONDS", "TOKENS", "FUEL")
    listed = table("RUN", "TENANT", "MODULE", "STATUS", *(() if narrow else ("STARTED",)), *numbers, right=numbers)
    for run in runs:
        listed.add_row(
            *(run.run, run.tenant, run.module),
            _status(run, narrow=narrow),
            *(() if narrow else (when(run.started),)),
            *(f"{run.seconds:.1f}", str(run.usage.new_tokens)),
            f"{run.usage.fuel / 1e6:,.1f} M" if narrow else f"{run.usage.fuel:,}",
        )
    return listed


def _status(run: RunInfo, *, narrow: bool) -> str:
    """With the error of a run that failed and, where there is room, the trap or the limit."""
    if not run.error:
        return run.status
    details = run.error.get("details") or {}
    why = None if narrow else details.get("trap") or details.get("name")
    return printable(f"{run.status} ({run.error.get('code', '?')}{f': {why}' if why else ''})")


def logs(
    run: Annotated[str, typer.Argument(help="A run's id, such as r17.")], url: UrlOption = None, key: KeyOption = None
) -> None:
    """Print what a run has logged; why it failed, if it did, goes to standard error."""
    with connect(url, key) as client:
        log = client.run_log(run)
    for line in log.lines:
        write(f"{line.level:7} {printable(line.text)}\n")
    if not log.lines:
        err().print(f"{printable(run)} has logged nothing")
    if log.error is not None:
        error = log.error
        show_error(
            RealmError(
                str(error.get("code", "internal")),
                str(error.get("message", "")),
                details=error.get("details") or {},
                retry_after=error.get("retry_after"),
            )
        )


def cancel(
    run: Annotated[str, typer.Argument(help="A run's id, such as r17.")], url: UrlOption = None, key: KeyOption = None
) -> None:
    """Stop a run."""
    with connect(url, key) as client:
        out().print("cancelled" if client.cancel(run) else "it had ended already")


def generate(
    prompt: Annotated[str, typer.Argument(help="A message to answer (text to continue, if the model cannot chat).")],
    max_tokens: Annotated[int, typer.Option(min=1, help="Most tokens to generate.")] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 always takes the likeliest token.")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0, help="1 is off.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Makes the text repeatable.")] = None,
    adapter: Annotated[str | None, typer.Option(help="A LoRA adapter: a name of `realm adapters list`.")] = None,
    url: UrlOption = None,
    key: KeyOption = None,
) -> None:
    """Generate text, streamed as it comes."""
    params: dict[str, Any] = {"max_tokens": max_tokens, "temperature": temperature, "top_p": top_p}
    if seed is not None:
        params["seed"] = seed
    if adapter is not None:
        params["adapter"] = adapter
    with connect(url, key) as client:
        stream = client.stream(prompt, **params)
        last = ""
        try:
            for piece in stream:
                write(piece.text)
                last = piece.text or last
        except RealmError:
            # What it is about to be told begins a line.
            write("" if last[-1:] in ("", "\n") else "\n")
            raise
    write("\n")
    if stream.result is not None:
        err().print(usage_line(stream.result.usage), style="dim")


def login(
    url: Annotated[str, typer.Option("--url", envvar="REALM_URL", help="The server.")] = DEFAULT_URL,
    key: Annotated[
        str | None, typer.Option("--key", envvar="REALM_API_KEY", help="Your API key; asked for when left out.")
    ] = None,
) -> None:
    """Save a server and a key for later commands, after trying them."""
    key = (key or typer.prompt("API key", hide_input=True)).strip()
    with status(f"connecting to {url}"), SyncClient(url, key) as client:
        tenant = client.tenant
    path = save_login(Login(url, key))
    out().print(f"you are {tenant} at {url}; saved in {path}")


@modules_app.command("list")
def modules_list(url: UrlOption = None, key: KeyOption = None) -> None:
    """List your modules."""
    with connect(url, key) as client:
        modules = client.modules()
    listed = table("NAME", "VERSION", "SIZE", "CREATED", "SHA256", right=("VERSION", "SIZE"))
    for module in modules:
        listed.add_row(
            module.name, str(module.version), size(module.size), when(module.created), module.sha256[:16] + "…"
        )
    out().print(listed if modules else "no modules: `realm push FILE` adds one")


@modules_app.command("remove")
def modules_remove(name: str, url: UrlOption = None, key: KeyOption = None) -> None:
    """Remove one of your modules."""
    with connect(url, key) as client:
        client.remove(name)
    out().print(f"removed {name}")
