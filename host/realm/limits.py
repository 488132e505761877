"""What one tenant may take, in one place: every limit with its unit, its default and where it counts.

:class:`TenantLimits` is the only list of limits: the command line, the protocol, the registry and the
checks all read it. What an operator sets for a tenant goes before what is set as the default for all,
and that before the values here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, get_type_hints

import msgspec
from msgspec import Meta

from realm.errors import RealmError
from realm.run_messages import RunLimits

_MOST = 1 << 53
"""Largest value: what JSON keeps exact."""


def _count(unit: str, doc: str, *, low: int = 0, high: int = _MOST) -> Meta:
    return Meta(ge=low, le=high, description=doc, extra={"unit": unit})


class TenantLimits(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, gc=False):
    """All limits of one tenant. 0 allows nothing; there is no value for "unlimited"."""

    fuel_per_run: Annotated[int, _count("fuel", "what one run may burn; a unit is about one instruction", low=1)] = (
        20_000_000_000
    )
    fuel_per_second: Annotated[
        int, _count("fuel/s", "of all runs together; beyond it they are slowed, not ended", low=1_000_000)
    ] = 1_000_000_000
    seconds_per_run: Annotated[int, _count("s", "wall time of one run", low=1, high=86_400)] = 600
    seconds_to_first_call: Annotated[
        int, _count("s", "wall time from a run's start to its first host call", low=1, high=86_400)
    ] = 30
    memory_bytes: Annotated[int, _count("bytes", "linear memory of one guest", low=65_536, high=4 << 30)] = 64 << 20
    table_elements: Annotated[int, _count("elements", "of each of a guest's tables (at most 16)", high=1_000_000)] = (
        65_536
    )
    running_guests: Annotated[int, _count("runs", "in progress at a time; more wait", high=65_536)] = 256
    waiting_guests: Annotated[int, _count("runs", "waiting for a place; more are refused", high=65_536)] = 1024
    kv_pages: Annotated[int, _count("pages", "of the KV cache (16 tokens each) held at a time", low=1)] = 8192
    tokens_per_run: Annotated[int, _count("tokens", "prompt and new tokens of one run")] = 1_000_000
    tokens_per_minute: Annotated[int, _count("tokens/min", "prompt and new tokens of all runs together")] = 1_000_000
    sequences_per_run: Annotated[int, _count("sequences", "open at a time in one run", high=65_536)] = 256
    saved_sequences: Annotated[int, _count("sequences", "kept by name", high=65_536)] = 64
    output_bytes_per_run: Annotated[int, _count("bytes", "that one run may emit")] = 16 << 20
    log_bytes_per_run: Annotated[int, _count("bytes", "that one run may log, 64 more for each line", high=64 << 20)] = (
        256 << 10
    )
    module_bytes: Annotated[int, _count("bytes", "of one module", high=256 << 20)] = 16 << 20
    stored_modules: Annotated[int, _count("versions", "of all modules together", high=1_000_000)] = 256
    stored_bytes: Annotated[int, _count("bytes", "of all stored modules together")] = 512 << 20
    store_bytes: Annotated[int, _count("bytes", "of the guests' key-value store, 64 more for each entry")] = 16 << 20
    adapter_bytes: Annotated[int, _count("bytes", "of one adapter's weights", high=4 << 30)] = 64 << 20
    stored_adapters: Annotated[int, _count("adapters", "stored by name", high=100_000)] = 64
    stored_adapter_bytes: Annotated[int, _count("bytes", "of all stored adapters together")] = 1 << 30
    pinned_adapters: Annotated[int, _count("adapters", "kept ready for the next step", high=1024)] = 2
    uploads: Annotated[int, _count("uploads", "in flight at a time", high=1024)] = 4
    connections: Annotated[int, _count("connections", "open at a time", high=65_536)] = 256
    requests_per_minute: Annotated[int, _count("calls/min", "of all connections together")] = 6000

    def for_run(self) -> RunLimits:
        """The part that counts inside one run."""
        return RunLimits(
            fuel=self.fuel_per_run,
            wall_seconds=float(self.seconds_per_run),
            memory_bytes=self.memory_bytes,
            table_elements=self.table_elements,
            tokens=self.tokens_per_run,
            output_bytes=self.output_bytes_per_run,
            log_bytes=self.log_bytes_per_run,
            sequences=self.sequences_per_run,
            first_call_seconds=float(self.seconds_to_first_call),
        )


@dataclass(frozen=True)
class LimitDoc:
    """One limit as a person reads it."""

    name: str
    unit: str
    default: int
    doc: str
    low: int
    high: int


def _documented() -> Iterator[LimitDoc]:
    hints = get_type_hints(TenantLimits, include_extras=True)
    for field in msgspec.structs.fields(TenantLimits):
        (meta,) = hints[field.name].__metadata__
        yield LimitDoc(field.name, meta.extra["unit"], field.default, meta.description, meta.ge, meta.le)


LIMITS: dict[str, LimitDoc] = {limit.name: limit for limit in _documented()}
"""Every limit by its name, in the order of :class:`TenantLimits`."""


def effective(*layers: Mapping[str, int]) -> TenantLimits:
    """The limits that ``layers`` of chosen values give; later layers go before earlier ones.

    Raises:
        RealmError: ``invalid_params`` naming the limit that is unknown or out of its range.
    """
    chosen: dict[str, int] = {}
    for layer in layers:
        chosen.update(layer)
    for name, value in chosen.items():
        if name not in LIMITS:
            raise RealmError(
                "invalid_params",
                f"there is no limit {name[:64]!r}; there are {', '.join(LIMITS)}",
                details={"param": name[:64], "available": list(LIMITS)},
            )
        known = LIMITS[name]
        # A bool is an int in Python, and no number of anything.
        if type(value) is not int or not known.low <= value <= known.high:
            raise RealmError(
                "invalid_params",
                f"{name} is {value!r}; it must be {known.low:,} to {known.high:,} {known.unit}",
                details={"param": name, "low": known.low, "high": known.high},
            )
    return TenantLimits(**chosen)


def over_limit(
    name: str,
    limit: float,
    used: float,
    text: str,
    *,
    code: str = "limit_exceeded",
    retry_after: float | None = None,
) -> RealmError:
    """The error of a tenant that meets a limit: it names the limit, its value and what was used.

    With ``retry_after`` (seconds) waiting helps, and the code is ``rate_limited`` unless one is given.
    """
    if retry_after is not None and code == "limit_exceeded":
        code = "rate_limited"
    unit = LIMITS[name].unit
    return RealmError(
        code,
        f"{text}: {name} is {limit:,} {unit}, used {used:,}",
        details={"name": name, "limit": limit, "used": used, "unit": unit},
        retry_after=retry_after,
    )
