"""Host functions on the run itself: input, output, messages, log, store, time, budgets."""

from __future__ import annotations

from functools import partial

from realm.guests.abi import ErrorCode
from realm.guests.calls_text import fill
from realm.guests.decoding import Refused, Room
from realm.guests.deferral import COPY_FUEL, Steps
from realm.guests.run import GuestRun, clipped
from realm.run_messages import StoreGet, StoreReply, StoreSet

BAD_TEXT_FUEL = 50
"""Fuel a byte of a log line that is not UTF-8: 10 ns, nearly all for what takes the bad bytes' place."""
COPY_STEP = 512 << 10
"""Longer copies are done in steps of so many bytes."""
LOG_LEVELS = ("debug", "info", "warning", "error")


class SessionCalls:
    """Groups session, store and misc of the table."""

    # --- session ----------------------------------------------------------------------------------

    def input_len(self, run: GuestRun) -> int:
        return len(run.start.input)

    def input_read(self, run: GuestRun, offset: int, out: Room) -> int | None:
        data = run.start.input
        if offset > len(data):
            raise Refused(ErrorCode.INVALID_ARGUMENT, f"offset is {offset}; the input has {len(data)} bytes")
        piece = memoryview(data)[offset : offset + out.capacity]
        run.charge(COPY_FUEL * len(piece))
        if len(piece) > COPY_STEP:
            run.job = _copy(run, out.pointer, piece)
            return None
        run.memory.write(out.pointer, piece)
        return len(piece)

    def emit(self, run: GuestRun, data: bytes) -> int | None:
        size = len(data)
        if size > run.output_left:
            limit = run.start.limits.output_bytes
            used = limit - run.output_left
            raise run.refuse_limit("output_bytes_per_run", limit, used, f"no room for {size:,} more bytes of output")
        if not size:
            return 0
        run.output_left -= size
        run.usage.output_bytes += size
        if size <= run.credit:
            run.send_output(data)
            return 0
        run.outbox = memoryview(data)
        run.on_wake = partial(_emit_more, run)
        return run.on_wake(False)

    def recv(self, run: GuestRun, out: Room, timeout_ms: int) -> int | None:
        run.on_wake = partial(_receive, run, out)
        result = _receive(run, out, timeout_ms == 0)
        if result is None:
            run.runtime.wake_at(run, run.runtime.clock() + timeout_ms / 1000)
        return result

    def log(self, run: GuestRun, level: int, text: bytes) -> int:
        if run.log_full:
            return int(ErrorCode.LIMIT)
        try:
            line = text.decode()
        except UnicodeDecodeError:
            run.charge(BAD_TEXT_FUEL * len(text))
            line = text.decode("utf-8", "replace")
        if not run.write_log(LOG_LEVELS[level], line):
            return int(ErrorCode.LIMIT)
        if LOG_LEVELS[level] == "error":
            # What the guest itself says of its failure belongs into its report.
            run.last_error = clipped(line)
        return 0

    # --- store ------------------------------------------------------------------------------------

    def kv_get(self, run: GuestRun, key: str, out: Room) -> None:
        call = run.store_call(partial(_stored, run, "kv_get", out))
        run.event(StoreGet(call, run.start.run, key))

    def kv_set(self, run: GuestRun, key: str, value: bytes) -> None:
        call = run.store_call(partial(_stored, run, "kv_set", None))
        run.event(StoreSet(call, run.start.run, key, value))

    # --- misc -------------------------------------------------------------------------------------

    def now(self, run: GuestRun) -> int:
        return int(run.runtime.wall_clock() * 1000)

    def random(self, run: GuestRun) -> int:
        return run.next_random()

    def fuel_left(self, run: GuestRun) -> int:
        return run.fuel_left()

    def tokens_left(self, run: GuestRun) -> int:
        return run.tokens_left


def _copy(run: GuestRun, pointer: int, data: memoryview) -> Steps:
    """Copy to the guest, a part each slice."""
    for at in range(0, len(data), COPY_STEP):
        if at:
            yield
        run.memory.write(pointer + at, data[at : at + COPY_STEP])
    return len(data)


def _emit_more(run: GuestRun, _late: bool) -> int | None:
    """Send what the credit allows; done when nothing is left."""
    if run.closing is not None:
        return int(ErrorCode.CLOSED)
    size = min(run.credit, len(run.outbox))
    if size > 0:
        run.send_output(bytes(run.outbox[:size]))
        run.outbox = run.outbox[size:]
    if run.outbox:
        return None
    run.on_wake = None
    return 0


def _receive(run: GuestRun, out: Room, late: bool) -> int | None:
    """Take a message if there is one; ``late`` says that the guest's time is over."""
    if run.closing is not None:
        result: int = ErrorCode.CLOSED
    elif run.inbox:
        result = fill(run, out, run.inbox[0])
        if result <= out.capacity:
            run.take_message()
            run.charge(COPY_FUEL * result)
    elif run.closed_input:
        result = ErrorCode.CLOSED
    elif late:
        result = ErrorCode.TIMED_OUT
    else:
        return None
    run.on_wake = None
    return int(result)


def _stored(run: GuestRun, name: str, out: Room | None, reply: StoreReply) -> int:
    if reply.code < 0:
        run.warn(f"{name}: {reply.message or ErrorCode(reply.code).name}")
        if reply.limit is not None:
            run.limit = reply.limit
        return reply.code
    if out is None:
        return 0
    return fill(run, out, reply.value or b"")
