"""JSON from tenants: one object, no key twice in any object, no number that is none.

Of a key that is there twice, readers take the one or the other; what was checked must be what is used.
"""

from __future__ import annotations

import json
from typing import Any, NoReturn


class JsonError(ValueError):
    """What is wrong, in words that fit behind "it"."""


def parse_object(raw: bytes) -> dict[str, Any]:
    """The object in ``raw`` (UTF-8). The caller bounds its size; memory is at most some 40 times that.

    Raises:
        JsonError: it is not one.
    """
    try:
        value = json.loads(raw.decode(), object_pairs_hook=_object, parse_constant=_constant)
    except JsonError:
        raise
    except (ValueError, RecursionError) as error:
        raise JsonError(f"is not JSON: {shown(error, 100)}") from error
    if not isinstance(value, dict):
        raise JsonError("is not a JSON object")
    return value


def shown(value: object, limit: int = 60) -> str:
    """``value`` for a message: printable ASCII of at most ``limit`` characters."""
    text = value if isinstance(value, str) else str(value)
    short = text[:limit]
    if not (short.isascii() and short.isprintable()):
        short = ascii(short)[1:-1][:limit]
    return short + "…" if len(text) > limit else short


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    whole = dict(pairs)
    if len(whole) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise JsonError(f"has {shown(twice)!r} twice")
    return whole


def _constant(name: str) -> NoReturn:
    raise JsonError(f"has {name}, which is no number")
