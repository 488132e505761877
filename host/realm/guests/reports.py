"""How a run that failed is reported: which limit, or which trap, where, and after what."""

from __future__ import annotations

from typing import Any

from realm.errors import RealmError
from realm.guests.abi import ErrorCode
from realm.guests.fiber_types import TrapInfo
from realm.guests.run import GuestRun, clipped
from realm.limits import LIMITS, over_limit
from realm.run_messages import ErrorInfo

_CODES = {"tokens_per_run": "token_limit", "output_bytes_per_run": "output_limit"}
"""Codes of limits that the guest was told of and that ended it; others are ``limit_exceeded``."""
_ERROR_NUMBERS = frozenset(int(code) for code in ErrorCode)
BUSY_SECONDS = 1.0
MAX_FRAMES = 20
FRAME_CHARACTERS = 100


def facts(run: GuestRun) -> dict[str, Any]:
    """What every report of a failed run has: fuel burnt, memory, and the last host call."""
    return {"fuel": run.fuel_used(), "memory_bytes": run.memory_held, "last_call": run.last_call}


def _info(error: RealmError, more: dict[str, Any]) -> ErrorInfo:
    return ErrorInfo(error.code, error.message, {**error.details, **more}, error.retry_after)


def _frames(trap: TrapInfo) -> list[str]:
    """The innermost frames; a function's name is the module's to choose."""
    return [clipped(frame, FRAME_CHARACTERS) for frame in trap.frames[:MAX_FRAMES]]


def wall_time(run: GuestRun, used: float) -> ErrorInfo:
    limit = run.start.limits.wall_seconds
    error = over_limit("seconds_per_run", limit, round(used, 3), "the run took too long", code="wall_time_exceeded")
    return _info(error, facts(run))


def first_call(run: GuestRun, used: float) -> ErrorInfo:
    limit = run.start.limits.first_call_seconds
    error = over_limit(
        "seconds_to_first_call", limit, round(used, 3), "the guest made no host call", code="first_call_timeout"
    )
    return _info(error, facts(run))


def fuel(run: GuestRun, trap: TrapInfo | None = None) -> ErrorInfo:
    limit = run.start.limits.fuel
    error = over_limit("fuel_per_run", limit, limit, "the run burnt its fuel", code="fuel_exhausted")
    return _info(error, facts(run) | {"fuel": limit, "backtrace": _frames(trap) if trap else []})


def refused(run: GuestRun, code: int) -> ErrorInfo | None:
    """For a guest that returned LIMIT: the limit that refused it, if one did."""
    met = run.limit
    if code != ErrorCode.LIMIT or met is None or met.name not in LIMITS:
        return None
    error = over_limit(
        met.name,
        met.limit,
        met.used,
        f"{run.last_call} was refused",
        code=_CODES.get(met.name, "limit_exceeded"),
        retry_after=met.retry_after,
    )
    return _info(error, facts(run) | {"last_error": run.last_error})


def guest_error(run: GuestRun, code: int) -> ErrorInfo:
    name = ErrorCode(code).name.lower() if code in _ERROR_NUMBERS else "unknown"
    message = f"the guest returned {code} ({name})"
    if run.last_error:
        message += f"; its last error: {run.last_error}"
    return ErrorInfo("guest_error", message, {"code": code, "name": name, "last_error": run.last_error})


def busy(problem: str) -> ErrorInfo:
    return ErrorInfo("busy", f"{problem}; try again when other runs have ended", {}, BUSY_SECONDS)


def crowded(run: GuestRun, limit: int, used: int) -> ErrorInfo:
    """For the largest run of the tenant that holds most, when a worker's memory is used up."""
    text = "the worker's memory is used up by all guests together, and this tenant's hold most of it"
    error = over_limit("memory_bytes", limit, used, text, code="memory_limit", retry_after=BUSY_SECONDS)
    return _info(error, facts(run))


def trapped(run: GuestRun, trap: TrapInfo) -> ErrorInfo:
    """For a guest that died of its own doing."""
    limits = run.start.limits
    if trap.kind == "out_of_fuel":
        return fuel(run, trap)
    if trap.kind == "no_room":
        return busy(f"this worker has no room for another guest ({clipped(trap.message)})")
    if trap.kind == "memory_limit":
        name, limit = "memory_bytes", limits.memory_bytes
        if "table" in trap.message:
            name, limit = "table_elements", limits.table_elements
        text = f"the module cannot be started: {clipped(trap.message)}"
        used = facts(run)["memory_bytes"] if name == "memory_bytes" else 0
        return _info(over_limit(name, limit, used, text, code="memory_limit"), facts(run))
    details = {
        "trap": trap.kind,
        "message": clipped(trap.message),
        "backtrace": _frames(trap),
        "last_error": run.last_error,
        "memory_limit": limits.memory_bytes,
        **facts(run),
    }
    return ErrorInfo("guest_trap", f"the guest trapped: {clipped(trap.message)}", details)


def stopped(error: RealmError) -> ErrorInfo:
    """For a run that could not begin."""
    return _info(error, {})


def internal(text: str, correlation: str) -> ErrorInfo:
    message = f"{text}; the host's log has the cause under {correlation}"
    return ErrorInfo("internal", message, {"correlation": correlation})
