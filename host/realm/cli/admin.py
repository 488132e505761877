"""Tenants and their keys; all of it needs an admin key."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from realm.cli.connection import KeyOption, UrlOption, connect
from realm.cli.terminal import err, out, table, when
from realm.errors import RealmError
from realm.limits import LIMITS
from realm.settings import default_home
from realm_sdk import TenantLimits

if TYPE_CHECKING:
    from realm.registry.records import NewKey

tenants_app = typer.Typer(help="Tenants and their limits (needs an admin key).", no_args_is_help=True)
keys_app = typer.Typer(help="API keys (needs an admin key).", no_args_is_help=True)


@tenants_app.command("add")
def tenants_add(name: str, url: UrlOption = None, key: KeyOption = None) -> None:
    """Make a tenant and its first key."""
    with connect(url, key) as client:
        client.add_tenant(name)
        made = client.add_key(name)
    _show_key(made.key, f"tenant {name}, key {made.id}")


@tenants_app.command("list")
def tenants_list(url: UrlOption = None, key: KeyOption = None) -> None:
    """List all tenants."""
    with connect(url, key) as client:
        tenants = client.tenants()
    listed = table("NAME", "CREATED", "KEYS", right=("KEYS",))
    for tenant in tenants:
        listed.add_row(tenant.name, when(tenant.created), str(tenant.keys))
    out().print(listed)


@tenants_app.command("show")
def tenants_show(
    name: Annotated[str | None, typer.Argument(help="A tenant's name; without, what counts for all.")] = None,
    url: UrlOption = None,
    key: KeyOption = None,
) -> None:
    """Show all limits of a tenant, and what it uses. A tenant's own key shows that tenant."""
    with connect(url, key) as client:
        tenant = client.show_tenant(name)
    _show_limits(tenant)


@tenants_app.command("set")
def tenants_set(
    given: Annotated[
        list[str],
        typer.Argument(metavar="[NAME] LIMIT=VALUE...", help="Such as kv_pages=4_000 memory_bytes=128MiB uploads="),
    ],
    default: Annotated[bool, typer.Option("--default", help="Set what counts for all tenants.")] = False,
    url: UrlOption = None,
    key: KeyOption = None,
) -> None:
    """Set limits of a tenant, or with --default of all; `LIMIT=` returns one to the default.

    They count at once, for what is taken from then on.
    """
    name = None if default or "=" in given[0] else given[0]
    if name is None and not default:
        raise typer.BadParameter("name a tenant, or give --default for all")
    pairs = [parse_limit(text) for text in given[0 if name is None else 1 :]]
    changes = dict(pairs)
    if len(changes) < len(pairs):
        raise typer.BadParameter("a limit is given twice")
    with connect(url, key) as client:
        tenant = client.set_limits(name, changes)
    _show_limits(tenant)


_VALUE = re.compile(r"([0-9][0-9_,]*)(KiB|MiB|GiB)?")
_FACTORS = {None: 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}


def parse_limit(text: str) -> tuple[str, int | None]:
    """``limit=value``, with ``10_000`` and, for bytes, ``64MiB``; None for no value."""
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise typer.BadParameter(f"{text!r} is not LIMIT=VALUE")
    if not value:
        return name, None
    found = _VALUE.fullmatch(value)
    if found is None:
        raise typer.BadParameter(f"{name}: {value!r} is not a number such as 10_000 or 64MiB")
    unit = found[2]
    # A limit that only a newer server knows is for that to judge.
    if unit and name in LIMITS and LIMITS[name].unit != "bytes":
        raise typer.BadParameter(f"{name} counts {LIMITS[name].unit}, not bytes")
    return name, int(re.sub("[_,]", "", found[1])) * _FACTORS[unit]


def _show_limits(tenant: TenantLimits) -> None:
    if tenant.name is None:
        out().print("what counts for tenants without limits of their own")
    else:
        out().print(f"tenant {tenant.name}, made {when(tenant.created)}, keys: {tenant.keys}")
    listed = table("LIMIT", "VALUE", "UNIT", "FROM", "USED", "MEANING", right=("VALUE", "USED"))
    for limit in tenant.limits:
        used = "-" if limit.used is None else f"{limit.used:,}"
        listed.add_row(limit.name, f"{limit.value:,}", limit.unit, limit.source, used, limit.doc)
    out().print(listed)


@keys_app.command("add")
def keys_add(
    tenant: Annotated[str, typer.Argument(help="The tenant's name.")],
    offline: Annotated[
        bool, typer.Option("--offline", help="Write to the data folder (REALM_HOME) of a server that is stopped.")
    ] = False,
    url: UrlOption = None,
    key: KeyOption = None,
) -> None:
    """Make another key for a tenant.

    A lost admin key: stop the server, then `realm keys add admin --offline` makes another.
    """
    if offline:
        made_here = asyncio.run(_add_key_offline(default_home(), tenant))
        _show_key(made_here.key, f"tenant {made_here.tenant}, key {made_here.id}")
        return
    with connect(url, key) as client:
        made = client.add_key(tenant)
    _show_key(made.key, f"tenant {made.tenant}, key {made.id}")


async def _add_key_offline(home: Path, tenant: str) -> NewKey:
    # The server's packages are behind these imports.
    from realm.registry.thread import Registry
    from realm.serve import locked_home

    if not (home / "registry.sqlite").is_file():
        raise RealmError("file_not_found", f"{home} holds no registry: the first `realm serve` there prints the key")
    with locked_home(home):
        registry = await Registry.open(home)
        try:
            return await registry.run(lambda database: database.add_key(tenant))
        finally:
            await registry.close()


@keys_app.command("list")
def keys_list(
    tenant: Annotated[str | None, typer.Argument(help="Only this tenant's.")] = None,
    url: UrlOption = None,
    key: KeyOption = None,
) -> None:
    """List keys: their ids, never the keys themselves."""
    with connect(url, key) as client:
        keys = client.keys(tenant)
    listed = table("ID", "TENANT", "CREATED", "REVOKED")
    for entry in keys:
        listed.add_row(entry.id, entry.tenant, when(entry.created), when(entry.revoked))
    out().print(listed)


@keys_app.command("revoke")
def keys_revoke(
    ident: Annotated[str, typer.Argument(metavar="ID", help="A key's id, from `realm keys list`.")],
    url: UrlOption = None,
    key: KeyOption = None,
) -> None:
    """Revoke a key: its connections end at once."""
    with connect(url, key) as client:
        client.revoke_key(ident)
    out().print(f"revoked {ident}")


def _show_key(key: str, whose: str) -> None:
    """The key alone on standard output, so that a script can take it."""
    err().print(f"{whose}; the server keeps only its hash: save it now")
    out().print(key)
