"""Shares of the loop, places for newcomers, and messages of fragments: the parts without sockets."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from websockets.frames import Frame, Opcode

from realm.gateway.admission import Admission
from realm.gateway.frames import Messages, TooManyFragments, received_size
from realm.gateway.pacing import READ_UNITS, TURN_SECONDS, TURN_UNITS, Refusals, Turns
from realm.settings import GatewayLimits
from tests.raw_client import frame


class Loop:
    """Callbacks of one turn run in the next."""

    def __init__(self) -> None:
        self.next: list[Callable[[], None]] = []
        self.now = 0.0

    def clock(self) -> float:
        return self.now

    def call_soon(self, callback: Callable[[], None]) -> None:
        self.next.append(callback)

    def turn(self) -> bool:
        callbacks, self.next = self.next, []
        for callback in callbacks:
            callback()
        return bool(callbacks)


class FakeReader:
    """Has so many frames to handle, and writes down when it does."""

    def __init__(self, tenant: str, frames: int, log: list[tuple[str, int]], *, broken: bool = False) -> None:
        self.tenant = tenant
        self.frames = frames
        self.log = log
        self.broken = broken
        self.aborted = False

    def read(self, units: int, late: Callable[[], bool]) -> tuple[int, bool]:
        assert 0 < units <= READ_UNITS
        if self.broken:
            raise ValueError("a fault of the host's")
        used = min(units, self.frames)
        self.frames -= used
        self.log.append((self.tenant, used))
        return used, self.frames > 0

    def abort(self) -> None:
        self.aborted = True


def test_a_single_frame_is_handled_at_once() -> None:
    loop, log = Loop(), list[tuple[str, int]]()
    turns = Turns(loop.call_soon, loop.clock)
    turns.ask(FakeReader("a", 1, log))
    assert log == [("a", 1)] and len(turns) == 0


def test_a_turn_is_bounded_and_the_next_goes_on() -> None:
    loop, log = Loop(), list[tuple[str, int]]()
    turns = Turns(loop.call_soon, loop.clock)
    readers = [FakeReader("a", 1000, log) for _ in range(50)]
    for reader in readers:
        turns.ask(reader)
    assert sum(used for _, used in log) == READ_UNITS
    quiet = FakeReader("b", 1, log)
    turns.ask(quiet)
    # However many connections the other has: bob waits for one share of it at most.
    log.clear()
    loop.turn()
    assert ("b", 1) in log[:2] and quiet.frames == 0
    while loop.turn():
        assert sum(used for _, used in log) <= 50 * 1000 + 1
    assert len(turns) == 0 and all(reader.frames == 0 for reader in readers)


@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 400), st.integers(0, 3)), max_size=30),
)
def test_everything_is_read_and_no_turn_is_long(asked: list[tuple[str, int, int]]) -> None:
    loop, log = Loop(), list[tuple[str, int]]()
    turns = Turns(loop.call_soon, loop.clock)
    readers = []
    for tenant, frames, turns_later in asked:
        for _ in range(turns_later):
            log.clear()
            loop.turn()
            assert sum(max(1, used) for _, used in log) <= TURN_UNITS
        reader = FakeReader(tenant, frames, log)
        readers.append(reader)
        turns.ask(reader)
        turns.ask(reader)
    for _ in range(10_000):
        log.clear()
        if not loop.turn():
            break
        assert sum(max(1, used) for _, used in log) <= TURN_UNITS
    assert len(turns) == 0 and not any(reader.frames for reader in readers)


def test_a_broken_reader_is_cut_and_others_go_on() -> None:
    loop, log = Loop(), list[tuple[str, int]]()
    turns = Turns(loop.call_soon, loop.clock)
    broken, well = FakeReader("a", 1, log, broken=True), FakeReader("a", 100, log)
    turns.ask(broken)
    turns.ask(well)
    while loop.turn():
        pass
    assert broken.aborted and well.frames == 0 and len(turns) == 0


class SlowReader(FakeReader):
    """Each of its frames takes so many seconds of the loop's clock."""

    def __init__(self, tenant: str, frames: int, log: list[tuple[str, int]], loop: Loop, seconds: float) -> None:
        super().__init__(tenant, frames, log)
        self.loop = loop
        self.seconds = seconds

    def read(self, units: int, late: Callable[[], bool]) -> tuple[int, bool]:
        used = 0
        while used < min(units, self.frames) and not (used and late()):
            used += 1
            self.loop.now += self.seconds
        self.frames -= used
        self.log.append((self.tenant, used))
        return used, self.frames > 0


@pytest.mark.parametrize("seconds", [TURN_SECONDS / 10, TURN_SECONDS, TURN_SECONDS * 10])
def test_frames_that_take_long_end_the_turn(seconds: float) -> None:
    loop, log = Loop(), list[tuple[str, int]]()
    turns = Turns(loop.call_soon, loop.clock)
    slow = [SlowReader("a", 50, log, loop, seconds) for _ in range(3)]
    for reader in slow:
        turns.ask(reader)
    most = TURN_SECONDS + seconds + 1e-9
    assert loop.now <= most
    quiet = FakeReader("b", 1, log)
    turns.ask(quiet)
    began = loop.now
    while quiet.frames:
        assert loop.turn()
    # One turn for what the other tenant had queued before, and one that begins with this one's.
    assert loop.now - began <= 2 * most
    turns_left = 0
    while True:
        before = loop.now
        if not loop.turn():
            break
        turns_left += 1
        assert loop.now - before <= most
    assert not any(reader.frames for reader in slow) and turns_left > 1 and len(turns) == 0


def test_refusals_pause_after_many_within_a_second() -> None:
    refusals = Refusals(GatewayLimits(refusals=3, refusal_pause=0.5))
    assert [refusals.refused("a", 1.0 + n / 10) for n in range(5)] == [0, 0, 0, 0.5, 0.5]
    assert refusals.refused("b", 1.5) == 0
    assert refusals.refused("a", 2.1) == 0
    refusals.forget(2.2)
    assert set(refusals._recent) == {"a", "b"}
    refusals.forget(3.2)
    assert not refusals._recent


@given(st.lists(st.tuples(st.sampled_from(["in", "out", "wait"]), st.integers(0, 3)), max_size=120))
def test_places_are_bounded_and_given_back(events: list[tuple[str, int]]) -> None:
    limits = GatewayLimits(newcomers=6, newcomers_per_address=3, newcomer_grace=1.0)
    admission: Admission[int] = Admission(limits)
    inside: dict[int, tuple[str, float]] = {}
    now, number = 0.0, 0
    for event, value in events:
        if event == "wait":
            now += value / 2
        elif event == "out" and inside:
            who = list(inside)[value % len(inside)]
            admission.leave(who)
            admission.leave(who)
            del inside[who]
        elif event == "in":
            address = "abcd"[value]
            room, leaving = admission.room(address, now)
            here = [who for who, (where, _) in inside.items() if where == address]
            if leaving is not None:
                assert room and now - inside[leaving][1] >= limits.newcomer_grace
                crowd, _ = inside.pop(leaving)
                assert crowd == address or len(inside) == limits.newcomers - 1
            elif not room:
                assert len(here) == 3 or len(inside) == 6
            else:
                assert len(here) < 3 and len(inside) < 6
            if room:
                number += 1
                admission.enter(number, address, now)
                inside[number] = (address, now)
        assert len(admission) == len(inside) <= limits.newcomers
    for who in inside:
        admission.leave(who)
    assert len(admission) == 0 and not admission._since


@given(st.lists(st.binary(max_size=20), min_size=1, max_size=12), st.booleans())
def test_fragments_join_in_order(parts: list[bytes], text: bool) -> None:
    opcode = Opcode.TEXT if text else Opcode.BINARY
    messages = Messages(10)
    for n, part in enumerate(parts):
        fin = n == len(parts) - 1
        given_ = Frame(opcode if n == 0 else Opcode.CONT, part, fin)
        if n >= 10:
            with pytest.raises(TooManyFragments):
                messages.add(given_)
            assert messages.held == 0 and not messages.begun
            return
        whole = messages.add(given_)
        assert messages.add(Frame(Opcode.PING, b"x")) is None
        assert (whole == (opcode, b"".join(parts))) if fin else (whole is None and messages.begun)
    assert messages.held == 0 and not messages.begun


@pytest.mark.parametrize("size", [0, 1, 125, 126, 65535, 65536, 1 << 20])
def test_received_sizes(size: int) -> None:
    assert received_size(size) == len(frame(2, bytes(size)))
