"""``realm adapters``: LoRA adapters on a server, stored from PEFT folders."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, TypeAlias

import typer
from rich.table import Table

from realm.cli.connection import KeyOption, UrlOption, connect
from realm.cli.terminal import out, printable, size, table, upload_bar, when
from realm_sdk import Adapter

_WIDE = 120
"""Columns that a terminal needs for why an adapter could not be loaded."""

_ALL_TARGETS = 7

app = typer.Typer(help="LoRA adapters: yours on the server, and those shared with you.", no_args_is_help=True)

NameArgument: TypeAlias = Annotated[str, typer.Argument(help="An adapter's name, from `realm adapters list`.")]


@app.command("add")
def add(
    folder: Annotated[
        Path, typer.Argument(exists=True, help="A PEFT folder: adapter_config.json and adapter_model.safetensors.")
    ],
    name: Annotated[str | None, typer.Option(help="What to call it.", show_default="the folder's name")] = None,
    model: Annotated[
        str | None, typer.Option(help="The served model that it is for.", show_default="whichever is served")
    ] = None,
    url: UrlOption = None,
    key: KeyOption = None,
) -> None:
    """Store an adapter on the server under a name, once all of it has been checked.

    One of the same name is replaced: what computes with the old one goes on as long as that is loaded.
    """
    with connect(url, key) as client, upload_bar() as progress:
        adapter = client.adapters.add(name or folder.resolve().name, folder, model=model, progress=progress)
    out().print(
        f"{adapter.name} version {adapter.version} for {printable(adapter.model)}: rank {adapter.rank} on "
        f"{_targets(adapter)}, {size(adapter.size)}, sha256 {adapter.sha256[:16]}…"
    )


@app.command("list")
def list_command(url: UrlOption = None, key: KeyOption = None) -> None:
    """List your adapters and those shared with you."""
    with connect(url, key) as client:
        adapters = client.adapters.list()
    console = out()
    if adapters:
        console.print(_listed(adapters, narrow=console.width < _WIDE))
    else:
        console.print("no adapters: `realm adapters add FOLDER --name NAME` adds one")


def _listed(adapters: list[Adapter], *, narrow: bool) -> Table:
    listed = table("NAME", "RANK", "TARGETS", "SIZE", "MODEL", "STATE", "PINNED", "SHARED", right=("RANK", "SIZE"))
    for adapter in adapters:
        failed = f": {adapter.error}" if adapter.error and not narrow else ""
        listed.add_row(
            *(printable(adapter.name), str(adapter.rank), _targets(adapter), size(adapter.size)),
            *(printable(adapter.model), printable((adapter.state or "-") + failed)),
            *("yes" if adapter.pinned else "-", _shared(adapter)),
        )
    return listed


def _targets(adapter: Adapter) -> str:
    """``q k v`` for q_proj, k_proj and v_proj; ``all`` for all seven."""
    short = [target.removesuffix("_proj") for target in adapter.targets]
    return "all" if len(short) == _ALL_TARGETS else printable(" ".join(short))


def _shared(adapter: Adapter) -> str:
    if not adapter.own:
        return "with you"
    return "with all" if adapter.shared else "-"


@app.command("show")
def show(name: NameArgument, url: UrlOption = None, key: KeyOption = None) -> None:
    """Show all that is known of an adapter."""
    with connect(url, key) as client:
        adapter = client.adapters.show(name)
    state = adapter.state or "not known: the engine restarts, or has another model"
    lines = {
        "name": adapter.name,
        "version": f"{adapter.version}, stored {when(adapter.created)}",
        "model": adapter.model,
        "rank": f"{adapter.rank}, alpha {adapter.alpha:g}",
        "targets": " ".join(adapter.targets),
        "parameters": f"{adapter.parameters:,}",
        "size": f"{size(adapter.size)}, sha256 {adapter.sha256}",
        "pinned": "yes" if adapter.pinned else "no",
        "shared": {"-": "no"}.get(_shared(adapter), _shared(adapter)),
        "state": f"{state}: {adapter.error}" if adapter.error else state,
    }
    # Of a shared one only its owner hears how it is used.
    if adapter.sequences is not None:
        lines["sequences"] = f"{adapter.sequences:,} now"
    if adapter.loads is not None:
        lines["loads"] = f"{adapter.loads:,} from disk"
    for label, text in lines.items():
        out().print(printable(f"{label:12}{text}"))


@app.command("pin")
def pin(name: NameArgument, url: UrlOption = None, key: KeyOption = None) -> None:
    """Have the engine keep one of your adapters ready, as far as there is room."""
    with connect(url, key) as client:
        client.adapters.pin(name)
    out().print(f"pinned {printable(name)}")


@app.command("unpin")
def unpin(name: NameArgument, url: UrlOption = None, key: KeyOption = None) -> None:
    """Let the engine unload it again when others need the room."""
    with connect(url, key) as client:
        client.adapters.unpin(name)
    out().print(f"unpinned {printable(name)}")


@app.command("share")
def share(name: NameArgument, url: UrlOption = None, key: KeyOption = None) -> None:
    """Let all tenants use one of the admin tenant's adapters (needs an admin key)."""
    with connect(url, key) as client:
        client.adapters.share(name)
    out().print(f"{printable(name)} is shared with all tenants; one of their own of that name goes before it")


@app.command("unshare")
def unshare(name: NameArgument, url: UrlOption = None, key: KeyOption = None) -> None:
    """Take a shared adapter back (needs an admin key); what computes with it goes on with it."""
    with connect(url, key) as client:
        client.adapters.unshare(name)
    out().print(f"{printable(name)} is shared no more")


@app.command("remove")
def remove(name: NameArgument, url: UrlOption = None, key: KeyOption = None) -> None:
    """Remove one of your adapters; what computes with it goes on as long as the engine has it loaded."""
    with connect(url, key) as client:
        client.adapters.remove(name)
    out().print(f"removed {printable(name)}")
