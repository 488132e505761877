"""What the command line writes, and how errors look."""

from __future__ import annotations

import sys
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn
from rich.table import Table
from rich.text import Text
from typer.core import TyperGroup

from realm.errors import RealmError as HostError
from realm_sdk import RealmError as SdkError
from realm_sdk import Usage

_LIMITS = "`realm tenants show NAME` lists a tenant's limits; `realm tenants set` (admin key) changes them"

HINTS = {
    "auth_failed": "give a good key with --key or REALM_API_KEY, or save one with `realm login`",
    "no_key": "give one with --key or REALM_API_KEY, or save one with `realm login`",
    "connect_failed": "is the server running? start it with `realm serve`, or name another with --url or REALM_URL",
    "forbidden": "this needs the admin key that the first `realm serve` printed",
    "model_not_found": "`realm models import` fetches a small model; `realm models list` shows all",
    "module_not_found": "`realm modules list` shows yours; `realm push FILE --name NAME` adds one",
    "adapter_not_found": "`realm adapters list` shows yours and the shared ones; `realm adapters add FOLDER` adds one",
    "adapter_invalid": "what is taken: PEFT's LoRA for this model, on q k v o gate up down, rank 1 to 256, no DoRA",
    "file_not_found": "give the path of a .wasm file; a module of the server is run by its name, without .wasm",
    "run_not_found": "`realm ps --all` shows runs",
    "tenant_not_found": "`realm tenants list` shows all",
    "key_not_found": "`realm keys list` shows the ids",
    "address_in_use": "choose another port with --port, or 0 for a free one",
    "already_running": "stop it first, or use another data folder with REALM_HOME",
    "busy": "try again in a moment",
    "adapter_too_large": _LIMITS,
    "limit_exceeded": _LIMITS,
    "rate_limited": _LIMITS,
}
"""What a person can do about an error, by its code."""

_SERVERS = {"model_not_found": "a server has one model: without --model that one is meant"}
"""The same, where an error of a server means something else than one of this machine."""


_HARMLESS = "\n\t\u200c\u200d"
"""Of the control and format characters: line breaks, tabs, and the joiners that scripts and emoji need."""


_NO_EDGE = 100_000
"""Columns of a console in which nothing is cut or wrapped."""


_FRAMES = 20
"""Most lines of a backtrace that are shown."""


def out() -> Console:
    """Standard output. Made when needed, so that it follows redirection: what is no terminal has no edge."""
    width = None if sys.stdout.isatty() else _NO_EDGE
    return Console(highlight=False, markup=False, soft_wrap=True, width=width)


def err() -> Console:
    """Standard error: everything that is not the result."""
    return Console(stderr=True, highlight=False, markup=False, soft_wrap=True)


def printable(text: str) -> str:
    """``text`` without control characters: guests' output must not steer the terminal of who reads it."""
    return "".join(c if c in _HARMLESS or unicodedata.category(c)[0] != "C" else "\ufffd" for c in text)


def write(text: str) -> None:
    """Write a guest's text to standard output at once; as it is, unless that is a terminal."""
    sys.stdout.write(printable(text) if sys.stdout.isatty() else text)
    sys.stdout.flush()


def show_error(error: HostError | SdkError) -> None:
    """One line ``code: message``, then details worth reading, then a hint."""
    code, message, details = error.code, error.message, error.details
    console = err()
    console.print(Text(f"{code}: ", style="bold red"), Text(printable(message)), sep="")
    for line in _report(details):
        console.print(Text(printable(line), style="dim"))
    if allowed := details.get("allowed"):
        names = allowed if isinstance(allowed, list) else [allowed]
        console.print(Text(printable(f"allowed: {', '.join(str(name) for name in names)}")))
    if correlation := details.get("correlation"):
        console.print(Text(printable(f"correlation: {correlation} (the host's log has the cause under it)")))
    if error.retry_after is not None:
        console.print(Text(f"retry after {error.retry_after:g} s"))
    hints = HINTS | _SERVERS if isinstance(error, SdkError) else HINTS
    if hint := hints.get(code):
        console.print(Text(f"hint: {hint}", style="cyan"))


def _report(details: dict[str, Any]) -> Iterator[str]:
    """How a guest ended: its trap, where that was, what it had taken and done last."""
    if trap := details.get("trap"):
        yield f"trap: {trap}"
    if backtrace := details.get("backtrace"):
        lines = backtrace if isinstance(backtrace, list) else str(backtrace).splitlines()
        yield from (f"    {line}" for line in lines[:_FRAMES])
        if len(lines) > _FRAMES:
            yield f"    … and {len(lines) - _FRAMES} more"
    took: list[str] = []
    if isinstance(fuel := details.get("fuel"), int):
        took.append(f"fuel {fuel:,}")
    if isinstance(memory := details.get("memory_bytes"), int):
        took.append(f"memory {size(memory)}")
    if call := details.get("last_call"):
        took.append(f"last host call {call}")
    if took:
        yield ", ".join(took)


class ErrorGroup(TyperGroup):
    """Turns typed errors into a line on standard error and exit code 1."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (HostError, SdkError) as error:
            show_error(error)
            raise typer.Exit(1) from None
        except BrokenPipeError:
            # Whoever read our output has gone (`realm ps | head -1`): not a failure, and nobody to tell.
            sys.stderr.close()
            raise typer.Exit(0) from None


@contextmanager
def status(text: str) -> Iterator[None]:
    """A spinner on standard error while something takes long."""
    with err().status(text):
        yield


@contextmanager
def upload_bar() -> Iterator[Callable[[int, int], None]]:
    """A bar on standard error for an upload, if that is a terminal; gives what to call with (bytes sent, all bytes)."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    console = err()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("hashing", total=None)

        def show(done: int, total: int) -> None:
            # The server checks what has come before it answers.
            bar.update(task, completed=done, total=total, description="uploading" if done < total else "checking")

        yield show


def table(*columns: str, right: tuple[str, ...] = ()) -> Table:
    """A plain table; columns named in ``right`` are numbers.

    Where it is wider than the terminal, text goes on in the next line; numbers stay whole.
    """
    made = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        number = column in right
        made.add_column(column, justify="right" if number else "left", no_wrap=number, overflow="fold")
    return made


def size(count: float) -> str:
    """Bytes for people: ``1.5 MiB``."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


def when(seconds: float | None) -> str:
    """A time (seconds since 1970), local; "-" for none."""
    if not seconds:
        return "-"
    return datetime.fromtimestamp(seconds, UTC).astimezone().strftime("%Y-%m-%d %H:%M:%S")


def usage_line(usage: Usage) -> str:
    """What a run took, on one line."""
    rate = f" ({usage.new_tokens / usage.wall_seconds:.1f}/s)" if usage.new_tokens and usage.wall_seconds else ""
    return (
        f"{usage.new_tokens} new tokens{rate}, {usage.prompt_tokens} prompt tokens ({usage.cached_tokens} cached); "
        f"fuel {usage.fuel:,}; peak memory {size(usage.memory_bytes)}; {usage.wall_seconds:.2f} s"
    )
