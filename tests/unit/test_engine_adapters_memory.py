"""Which adapters are in memory, and who makes room for whom."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from realm.engine.adapter_memory import ALIGNMENT, Ranges
from realm.engine.adapters import LEAST_STEPS
from realm.messages import (
    CallDone,
    ForwardDone,
)
from tests.adapter_stage import GREEDY, Stage
from tests.checked_runner import check_result


@pytest.fixture
def stage() -> Stage:
    return Stage()


# --- room -------------------------------------------------------------------------------------------------


def test_the_least_recently_used_makes_room(stage: Stage) -> None:
    seqs = {}
    for contents in range(5, 9):
        stage.register(f"n{contents}", contents)
        seqs[contents] = stage.open()
        stage.applied(seqs[contents], f"n{contents}")
        stage.say(seqs[contents], [1], contents)
    for _ in range(10):
        stage.turn()
    stage.say(seqs[5], [2], 5)
    for _ in range(10):
        stage.turn()
    stage.register("new", 9)
    seq = stage.open()
    stage.applied(seq, "new")
    stage.say(seq, [1], 9)
    assert stage.state("n6") == "registered"
    assert [stage.state(f"n{n}") for n in (5, 7, 8)] == ["resident"] * 3
    stage.say(seqs[6], [2], 6)
    assert stage.loader.reads == 6


def test_more_adapters_in_use_than_fit_take_turns() -> None:
    """Long generations, each under an adapter of its own, one slot: none starves, none is ever mixed up."""
    stage = Stage(slots=1)
    seqs = {}
    for contents in (5, 6, 7):
        stage.register(f"n{contents}", contents, tenant="abc"[contents - 5])
        seq = stage.open("abc"[contents - 5])
        call = stage.apply(seq, f"n{contents}")
        assert isinstance(stage.answer(call), CallDone)
        seqs[seq] = contents
    calls = {stage.forward(seq, [1]): (seq, [1]) for seq in seqs}
    done = dict.fromkeys(seqs, 0)
    for _ in range(600):
        stage.turn()
        for call in [call for call in calls if call in stage.worker.answers]:
            seq, tokens = calls.pop(call)
            result = stage.worker.answers.pop(call)
            assert isinstance(result, ForwardDone)
            stage.texts[seq] += tokens
            check_result(stage.texts[seq], GREEDY, result, seqs[seq])
            done[seq] += 1
            if len(stage.texts[seq]) < 120:
                calls[stage.forward(seq, [result.token])] = (seq, [result.token])
    assert all(count == 120 for count in done.values()), done
    # Each stays for some steps: not a load a token.
    assert stage.loader.puts < 3 * 120 / LEAST_STEPS + 10


def test_who_holds_most_gives_way_first() -> None:
    """A tenant that uses many adapters does not push out the only one of another."""
    stage = Stage(slots=4)
    stage.register("one", 5, tenant="b")
    theirs = stage.open("b")
    stage.applied(theirs, "one")
    stage.say(theirs, [1], 5)
    for contents in range(10, 30):
        stage.register(f"n{contents}", contents)
        seq = stage.open("a")
        stage.applied(seq, f"n{contents}")
        stage.say(seq, [1], contents)
        for _ in range(10):
            stage.turn()
        assert stage.state("one", "b") == "resident"
    assert stage.loader.reads == 21


def test_who_holds_least_is_served_first(stage: Stage) -> None:
    for contents in range(10, 20):
        stage.register(f"n{contents}", contents)
        stage.apply(stage.open("a"), f"n{contents}")
    stage.turn()
    stage.register("one", 5, tenant="b")
    call = stage.apply(stage.open("b"), "one")
    # One load is under way and one may follow; the other eight, of three turns each, have to wait.
    stage.answer(call, 8)


def test_pinned_adapters_come_by_themselves_and_stay(stage: Stage) -> None:
    stage.register("kept", 5, pinned=True)
    for _ in range(4):
        stage.turn()
    assert stage.state("kept") == "resident"
    for contents in range(10, 20):
        stage.register(f"n{contents}", contents)
        seq = stage.open("a")
        stage.applied(seq, f"n{contents}")
        stage.say(seq, [1], contents)
        for _ in range(10):
            stage.turn()
    assert stage.state("kept") == "resident" and stage.loader.reads == 11


def test_pinned_ones_leave_half_of_the_memory_to_others(stage: Stage) -> None:
    for contents in range(10, 14):
        stage.register(f"p{contents}", contents, pinned=True)
    for _ in range(20):
        stage.turn()
    for contents in (5, 6):
        stage.register(f"n{contents}", contents, tenant="b")
        seq = stage.open("b")
        stage.applied(seq, f"n{contents}")
        stage.say(seq, [1], contents)
    assert sum(stage.state(f"p{contents}") == "resident" for contents in range(10, 14)) >= 2


def test_unpinning_and_removing_gives_the_place_back(stage: Stage) -> None:
    stage.register("p1", 5, 512, pinned=True)
    for _ in range(4):
        stage.turn()
    stage.register("p1", 5, 512, pinned=False)
    stage.register("p2", 6, 512, pinned=True)
    for _ in range(4):
        stage.turn()
    assert stage.state("p2") == "resident"
    stage.engine.adapters.forget("a", "p2")
    stage.engine.check()
    assert stage.engine.adapters._keeping == 0


def test_cached_adapters_come_back_without_the_disk() -> None:
    stage = Stage(slots=1, cache=1 << 20)
    seqs = {}
    for contents in (5, 6):
        stage.register(f"n{contents}", contents)
        seqs[contents] = stage.open()
        stage.applied(seqs[contents], f"n{contents}")
    for _ in range(3):
        for contents, seq in seqs.items():
            stage.say(seq, [1], contents)
            for _ in range(10):
                stage.turn()
    assert stage.loader.reads == 2 and stage.loader.puts >= 6
    assert sorted(stage.state(f"n{contents}") for contents in (5, 6)) == ["cached", "resident"]


def test_the_cache_keeps_to_its_size() -> None:
    stage = Stage(slots=2, cache=512)
    for contents in range(5, 15):
        stage.register(f"n{contents}", contents)
        seq = stage.open()
        stage.applied(seq, f"n{contents}")
        stage.say(seq, [1], contents)
        kept = [adapter for adapter in stage.engine.adapters if adapter.weights is not None]
        assert sum(adapter.size for adapter in kept) <= 512


# --- ranges -----------------------------------------------------------------------------------------------


@given(
    capacity=st.integers(0, 5000),
    sizes=st.lists(st.tuples(st.booleans(), st.integers(1, 3000), st.integers(0, 30)), max_size=60),
)
def test_ranges_never_overlap_and_are_joined(capacity: int, sizes: list[tuple[bool, int, int]]) -> None:
    ranges = Ranges(capacity)
    taken: list[tuple[int, int]] = []
    for frees, size, which in sizes:
        if frees and taken:
            start, _ = taken.pop(which % len(taken))
            ranges.free(start)
        elif (at := ranges.allocate(size)) is not None:
            assert at % ALIGNMENT == 0 and at + size <= capacity
            assert all(at + size <= start or start + length <= at for start, length in taken)
            taken.append((at, size))
        else:
            room = sum(-(-length // ALIGNMENT) * ALIGNMENT for _, length in taken)
            assert room + size > capacity // ALIGNMENT * ALIGNMENT or len(taken) > 0
        ranges.check()
    for start, _ in taken:
        ranges.free(start)
    ranges.check()
    assert ranges.free_bytes == ranges.capacity
    if ranges.capacity:
        assert ranges.allocate(ranges.capacity) == 0
    with pytest.raises(KeyError):
        ranges.free(1)
