"""A step on its way: what was launched, for whom, and how its batch is put together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from realm.engine.batch import LAST_DRAWN, Chunk, Decodes, Draws, Ints, Launched, Longs, StepBatch
from realm.engine.lanes import Lanes, Ticket
from realm.engine.page_tables import Part, StepPlan
from realm.engine.sampling import LEAST_TEMPERATURE, MOST_TOP_K
from realm.engine.sequence import Call, Sequence
from realm.guests.draws import uniform, uniforms
from realm.messages import SamplingParams

if TYPE_CHECKING:
    from realm.engine.adapter import Adapter

_GREEDY = SamplingParams()


@dataclass(slots=True)
class Single:
    """An output row of a call that has no lane: ``logits`` is its place among the logits that come back, or -1."""

    row: int
    sequence: Sequence
    call: Call
    logits: int


@dataclass(slots=True)
class InFlight:
    """A launched step. ``ticket`` says whose its rows with lanes are, ``singles`` are the others; ``adapters`` are
    those of sequences without lanes, whose keys and values it writes for good."""

    handle: Launched
    ticket: Ticket
    singles: list[Single]
    began: float
    adapters: set[Adapter]


def may_go_on(call: Call) -> bool:
    """Whether the next call can be known before it is made: its token is drawn on the device, from nothing
    but the logits and numbers that follow from this call's."""
    p = call.sampling
    return (
        p is not None
        and not call.want_logits
        and p.mask is None
        and not on_host(p)
        and (p.temperature == 0 or p.number >= 0)
    )


def on_host(p: SamplingParams) -> bool:
    """Whether the core draws the token itself."""
    return p.repetition_penalty != 1 or p.bias_tokens is not None


def uniform_of(p: SamplingParams) -> float:
    """The number in [0, 1) that makes the draw."""
    return p.uniform if p.number < 0 else uniform(p.key, p.number)


def build_batch(lanes: Lanes, rows: Longs, plan: StepPlan, placed: list[int]) -> tuple[StepBatch, Ticket, list[Single]]:
    """The batch of a step.

    Args:
        rows: lanes whose next row is in the step; they are not counted as launched yet.
        plan: what the scheduler adds. placed: for each of its parts the lane that its sequence got, or -1.

    Output rows are those of the lanes, then the plan's single tokens, then its chunks that end a call.
    """
    count = len(rows)
    decode = [at for at, part in enumerate(plan.parts) if part.finishes and part.count == 1]
    longer = [at for at, part in enumerate(plan.parts) if not part.finishes or part.count > 1]
    chunks: list[Chunk] = []
    finishing = list(decode)
    for at in longer:
        part = plan.parts[at]
        chunks.append(_chunk(part, placed[at]))
        if part.finishes:
            finishing.append(at)
    outputs = count + len(finishing)
    positions = np.empty(count + len(decode), dtype=np.int32)
    tokens = np.full(count + len(decode), LAST_DRAWN, dtype=np.int32)
    places = np.empty(count + len(decode), dtype=np.int32)
    places[:count] = rows
    positions[:count] = lanes.base[rows] + lanes.launched[rows]
    for row, at in enumerate(decode, count):
        part = plan.parts[at]
        tokens[row] = part.sequence.tokens[part.start]
        positions[row] = part.start
        lane = placed[at]
        if lane < 0:
            lane = lanes.count + row - count
            lanes.show(lane, part.sequence.pages)
        places[row] = lane
    longest = int(positions.max()) + 1 if len(positions) else 0
    draws = _lane_draws(lanes, rows, outputs)
    ticket_rows, ticket_lanes = [], []
    singles: list[Single] = []
    wanted: list[int] = []
    for row, at in enumerate(finishing, count):
        part, lane = plan.parts[at], placed[at]
        call = part.sequence.call if lane < 0 else None
        p = (part.sequence.sampling if call is None else call.sampling) or _GREEDY
        _set_draw(draws, row, p)
        if call is None:
            ticket_rows.append(row)
            ticket_lanes.append(lane)
            continue
        place = -1
        if call.want_logits or on_host(p):
            place = len(wanted)
            wanted.append(row)
        singles.append(Single(row, part.sequence, call, place))
    every = np.concatenate((rows, np.array(ticket_lanes, dtype=np.int64)))
    ticket = Ticket(
        np.concatenate((np.arange(count), np.array(ticket_rows, dtype=np.int64))), every, lanes.epoch[every]
    )
    parts = [plan.parts[at] for at in [*decode, *longer]]
    batch = StepBatch(
        Decodes(places, tokens, positions, lanes.tables, longest),
        chunks,
        draws,
        wanted,
        plan.copies,
        plan.fresh,
        _adapters(lanes, rows, parts),
    )
    return batch, ticket, singles


def _adapters(lanes: Lanes, rows: Longs, parts: list[Part]) -> Ints | None:
    """Adapter slots of the lanes' rows and of the plan's parts; None where nobody has one."""
    if not lanes.adapted and all(part.sequence.adapter is None for part in parts):
        return None
    slots = np.full(len(rows) + len(parts), -1, dtype=np.int32)
    slots[: len(rows)] = lanes.adapter[rows]
    for place, part in enumerate(parts, len(rows)):
        if part.sequence.adapter is not None:
            slots[place] = part.sequence.adapter.slot
    return slots if (slots >= 0).any() else None


def _chunk(part: Part, lane: int) -> Chunk:
    tokens = np.frombuffer(part.sequence.tokens, dtype=np.uint32)[part.start : part.start + part.count].copy()
    return Chunk(tokens, part.start, part.sequence.pages[:], part.finishes, lane)


def _lane_draws(lanes: Lanes, rows: Longs, outputs: int) -> Draws:
    """Draws of all output rows; those after the lanes' are greedy for now."""
    count = len(rows)
    draws = Draws(
        temperature=np.zeros(outputs, dtype=np.float32),
        top_k=np.zeros(outputs, dtype=np.int32),
        top_p=np.ones(outputs, dtype=np.float32),
        min_p=np.zeros(outputs, dtype=np.float32),
        uniform=np.zeros(outputs, dtype=np.float64),
        logprob=np.zeros(outputs, dtype=np.bool_),
    )
    if count:
        draws.temperature[:count] = lanes.temperature[rows]
        draws.logprob[:count] = lanes.logprob[rows]
        if draws.temperature.any():
            draws.top_k[:count] = lanes.top_k[rows]
            draws.top_p[:count] = lanes.top_p[rows]
            draws.min_p[:count] = lanes.min_p[rows]
            numbers = (lanes.number[rows] + lanes.launched[rows]).astype(np.uint64)
            draws.uniform[:count] = uniforms(lanes.key[rows], numbers)
    return draws


def _set_draw(draws: Draws, row: int, p: SamplingParams) -> None:
    draws.logprob[row] = p.logprob
    if on_host(p):
        return
    if p.mask is not None:
        draws.masks.append((row, p.mask))
    if p.temperature > 0:
        draws.temperature[row] = max(p.temperature, LEAST_TEMPERATURE)
        draws.top_k[row] = min(p.top_k, MOST_TOP_K)
        draws.top_p[row] = p.top_p
        draws.min_p[row] = p.min_p
        draws.uniform[row] = uniform_of(p)
