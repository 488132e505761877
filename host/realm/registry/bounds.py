"""How much of a run's error and log is kept.

Both come from guests by way of workers, and JSON makes up to six bytes of a character. With the run's own
entry (its usage is numbers only, its module's name is short) a finished run takes at most some 105 KiB, and
a tenant ``runs_kept`` times that: about 105 MiB, or twice that just before the oldest ones are forgotten.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from realm.registry.records import LogLine

ERROR_BYTES = 8 << 10
"""Most bytes of an error, as JSON."""
LOG_BYTES = 96 << 10
"""Most bytes of a run's log, as JSON: the 64 KiB that the gateway keeps of it, if they are ordinary text."""

_CODE = 64
_MESSAGE = 500
_TEXT = 100
_LINE = 4000
"""Characters that are kept of a code, a message, a text of the details, a line: each six bytes at most."""


def fit_error(error: dict[str, Any]) -> dict[str, Any]:
    """The error itself, or, if it is larger than :data:`ERROR_BYTES`, what matters most of it.

    Raises:
        TypeError, RecursionError, msgspec.MsgspecError: it cannot be written as JSON.
    """
    size = len(msgspec.json.encode(error))
    if size <= ERROR_BYTES:
        return error
    room = ERROR_BYTES // 2
    kept: dict[str, Any] = {}
    for name, value in error.get("details", {}).items():
        if isinstance(value, str):
            value = value[:_TEXT]
        elif not isinstance(value, int | float | None):
            continue
        taken = len(msgspec.json.encode({name: value}))
        if taken <= room:
            room -= taken
            kept[name] = value
    kept["left_out"] = f"the error took {size:,} bytes; {ERROR_BYTES:,} are kept"
    return {**error, "code": error["code"][:_CODE], "message": error["message"][:_MESSAGE], "details": kept}


def encode_log(lines: Sequence[LogLine]) -> str | None:
    """The log's end as JSON of at most :data:`LOG_BYTES`, with a line that says so if it is not all; None if empty."""
    room = LOG_BYTES - 256
    kept: list[bytes] = []
    for line in reversed(lines):
        piece = msgspec.json.encode(line)
        if len(piece) > LOG_BYTES // 2:
            more = f" ({len(line.text) - _LINE:,} characters more)" if len(line.text) > _LINE else ""
            piece = msgspec.json.encode(LogLine(line.level, line.text[:_LINE] + more))
        room -= len(piece) + 1
        if room < 0:
            break
        kept.append(piece)
    if left := len(lines) - len(kept):
        text = f"{left:,} earlier lines are left out: the log takes more than {LOG_BYTES:,} bytes"
        kept.append(msgspec.json.encode(LogLine("warning", text)))
    return f"[{b','.join(reversed(kept)).decode()}]" if kept else None
