"""Which adapters leave for a large one: few that lie together, not most of them wherever they lie."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from realm.engine.adapter_memory import ALIGNMENT, Ranges
from realm.messages import CallDone, ForwardDone, FreeSequence, TenantQuota
from tests.adapter_stage import GREEDY, PLENTY, Stage
from tests.checked_runner import check_result


def test_a_large_one_takes_the_place_of_few_that_lie_together() -> None:
    """Least recently used first, wherever they lie, would be most of them."""
    stage = Stage(slots=64, capacity=64 * 256)
    for number in range(64):
        stage.register(f"n{number}", 5 + number)
        seq = stage.open()
        stage.applied(seq, f"n{number}")
        stage.say(seq, [1], 5 + number)
        stage.worker.op(FreeSequence(seq))
        stage.worker.flush()
    order = [number * 29 % 64 for number in range(64)]
    adapters = {adapter.name: adapter for adapter in stage.engine.adapters}
    for used, number in enumerate(order):
        adapters[f"n{number}"].used = used
    stage.register("large", 100, 4 * 256, tenant="b")
    seq = stage.open("b")
    stage.applied(seq, "large")
    stage.say(seq, [1], 100)
    assert stage.engine.adapters.resident == 64 - 4 + 1


def test_ones_in_use_that_lie_together_make_room_for_a_large_one() -> None:
    stage = Stage(slots=8, capacity=8 * 256)
    stage.engine.set_quota(TenantQuota("", 200, PLENTY, 4))
    calls = {}
    for number in range(8):
        stage.register(f"n{number}", 5 + number)
        seq = stage.open()
        stage.applied(seq, f"n{number}")
        calls[stage.forward(seq, [1])] = seq
    stage.register("large", 100, 3 * 256, tenant="b")
    large = stage.open("b")
    wanted, applied = stage.apply(large, "large"), False
    fewest = 8
    for _ in range(200):
        stage.turn()
        for call in [call for call in calls if call in stage.worker.answers]:
            result = stage.worker.answers.pop(call)
            assert isinstance(result, ForwardDone)
            seq = calls.pop(call)
            calls[stage.forward(seq, [result.token])] = seq
        fewest = min(fewest, sum(a.usable for a in stage.engine.adapters if a.tenant == "a")) if applied else 8
        if wanted in stage.worker.answers:
            if applied:
                break
            assert stage.worker.answers.pop(wanted) == CallDone(wanted, 4)
            wanted, applied = stage.forward(large, [1]), True
    check_result([1], GREEDY, stage.worker.answers[wanted], 100)  # type: ignore[arg-type]
    assert fewest >= 5


@given(
    steps=st.lists(st.tuples(st.booleans(), st.integers(1, 900), st.integers(0, 30)), max_size=40),
    size=st.integers(1, 6000),
    data=st.data(),
)
def test_the_cheapest_ranges_are_those_that_a_search_of_all_finds(
    steps: list[tuple[bool, int, int]], size: int, data: st.DataObject
) -> None:
    ranges = Ranges(20 * ALIGNMENT)
    taken: dict[int, int] = {}
    for frees, length, which in steps:
        if frees and taken:
            start = sorted(taken)[which % len(taken)]
            ranges.free(start)
            del taken[start]
        elif (at := ranges.allocate(length)) is not None:
            taken[at] = -(-length // ALIGNMENT)
    free_to = data.draw(st.permutations([at for at in taken if data.draw(st.booleans())]))
    ranks = {at: rank for rank, at in enumerate(free_to)}
    owner = {at // ALIGNMENT + i: at for at, length in taken.items() for i in range(length)}
    places = -(-size // ALIGNMENT)
    costs = [
        (max([ranks[at] for at in touched], default=-1), len(touched))
        for first in range(20 - places + 1)
        if (touched := {owner[i] for i in range(first, first + places) if i in owner}) <= set(ranks)
    ]
    found = ranges.cheapest(size, ranks)
    if found is None:
        assert not costs
        return
    assert (max([ranks[at] for at in found], default=-1), len(found)) == min(costs)
    for at in found:
        ranges.free(at)
    assert ranges.allocate(size) is not None
