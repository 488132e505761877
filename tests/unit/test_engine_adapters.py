"""Adapters in the engine's core: who has which, what waits for them, and who makes room (a checked runner computes)."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from realm.engine.adapter import MAX_ADAPTER_NAME
from realm.engine.adapter_memory import ALIGNMENT, Ranges
from realm.engine.adapters import LEAST_STEPS
from realm.engine.core import EngineCore
from realm.guests.abi import ErrorCode
from realm.messages import (
    AdapterFile,
    AdapterState,
    ApplyAdapter,
    CallDone,
    CallFailed,
    EndRun,
    EngineResult,
    ForkSequence,
    ForwardDone,
    FreeSequence,
    OpenSaved,
    OpenSequence,
    SamplingParams,
    SaveSequence,
    TenantQuota,
)
from tests.adapter_loading import manual_loading
from tests.ahead_worker import AheadWorker
from tests.checked_runner import CheckedMemory, check_result, checked_engine

GREEDY = SamplingParams()
PLENTY = 1 << 40


class Stage:
    """An engine whose loader works when it is told to, and one worker."""

    def __init__(
        self, *, slots: int = 4, capacity: int = 1024, cache: int = 0, ahead: int = 2, clock: float = 1000.0
    ) -> None:
        self.engine: EngineCore
        self.engine, self.runner = checked_engine(
            run_ahead=ahead, pages=200, lanes=8, memory=CheckedMemory(slots, capacity), clock=lambda: clock
        )
        self.engine.adapters._cache = cache
        self.loader = manual_loading(self.engine)
        self.worker = AheadWorker(self.engine, 1)
        self.texts: dict[int, list[int]] = {}
        self.engine.set_quota(TenantQuota("", 200, PLENTY, 4))

    def register(
        self, name: str, contents: int, size: int = 256, *, tenant: str = "a", pinned: bool = False, path: str = ""
    ) -> None:
        self.engine.adapters.register(
            AdapterFile(tenant, name, path or f"{contents} {size}", str(contents), b"", pinned)
        )

    def open(self, tenant: str = "a", run: int = 1) -> int:
        seq = self.worker.fresh()
        self.worker.op(OpenSequence(seq, tenant, run))
        self.worker.flush()
        self.texts[seq] = []
        return seq

    def apply(self, seq: int, name: str) -> int:
        call = self.worker.call()
        self.worker.asked[call] = (seq, None)
        self.worker.op(ApplyAdapter(call, seq, name))
        self.worker.flush()
        return call

    def forward(self, seq: int, tokens: list[int], p: SamplingParams = GREEDY) -> int:
        call = self.worker.forward(seq, tokens, p)
        self.worker.flush()
        return call

    def turn(self, *, works: bool = True) -> None:
        if works:
            self.loader.work()
        self.engine.advance()
        if self.engine.in_flight < 2:
            self.engine.launch()
        self.engine.settle(True)
        for results, rows in self.engine.take().values():
            self.worker.receive(results, rows)
        self.engine.check()

    def answer(self, call: int, turns: int = 100) -> EngineResult:
        for _ in range(turns):
            if call in self.worker.answers:
                return self.worker.answers.pop(call)
            self.turn()
        raise AssertionError("the call is not answered")

    def applied(self, seq: int, name: str) -> EngineResult:
        return self.answer(self.apply(seq, name))

    def say(self, seq: int, tokens: list[int], contents: int, p: SamplingParams = GREEDY) -> int:
        """A call that must give what the adapter with these contents gives; its token."""
        result = self.answer(self.forward(seq, tokens, p))
        assert isinstance(result, ForwardDone), result
        self.texts[seq] += tokens
        check_result(self.texts[seq], p, result, contents)
        return result.token

    def state(self, name: str, tenant: str = "a") -> str:
        found = [state.state for state in self.engine.adapters.states(tenant) if state.name == name]
        return found[0] if found else "registered"


@pytest.fixture
def stage() -> Stage:
    return Stage()


# --- what a sequence computes with ------------------------------------------------------------------------


def test_a_sequence_computes_with_its_adapter_from_its_first_token(stage: Stage) -> None:
    stage.register("legal", 5)
    seq = stage.open()
    assert stage.applied(seq, "legal") == CallDone(1, 4)
    token = stage.say(seq, [1, 2, 3] * 9, 5)
    for _ in range(20):
        token = stage.say(seq, [token], 5)
    assert stage.worker.rows_sent > 10, "it did not go on by rows"


def test_what_was_computed_is_computed_again(stage: Stage) -> None:
    stage.register("legal", 5)
    seq = stage.open()
    stage.say(seq, [1, 2, 3] * 20, 0)
    assert stage.applied(seq, "legal") == CallDone(2, 4)
    stage.say(seq, [4], 5)
    assert stage.applied(seq, "") == CallDone(4, 0)
    stage.say(seq, [5], 0)


def test_applying_the_same_adapter_again_computes_nothing_anew(stage: Stage) -> None:
    stage.register("legal", 5)
    seq = stage.open()
    stage.applied(seq, "legal")
    stage.say(seq, [1] * 40, 5)
    before = stage.runner.computed
    assert stage.applied(seq, "legal") == CallDone(3, 4)
    stage.say(seq, [2], 5)
    assert stage.runner.computed - before < 10


def test_sequences_with_different_adapters_share_steps(stage: Stage) -> None:
    stage.register("x", 5)
    stage.register("y", 6)
    seqs = {stage.open(): 0}
    for name, contents in (("x", 5), ("y", 6)):
        seq = stage.open()
        stage.applied(seq, name)
        seqs[seq] = contents
    for _ in range(6):
        stage.turn()
    assert stage.state("x") == stage.state("y") == "resident", "they were not brought in before they were used"
    steps = stage.engine.stats().steps
    calls = {stage.forward(seq, [1] * 10): seq for seq in seqs}
    for call, seq in calls.items():
        result = stage.answer(call)
        assert isinstance(result, ForwardDone)
        check_result([1] * 10, GREEDY, result, seqs[seq])
    assert stage.engine.stats().max_sequences == 3
    assert stage.engine.stats().steps - steps < 5


def test_a_fork_and_a_saved_copy_keep_the_adapter(stage: Stage) -> None:
    stage.register("legal", 5)
    seq = stage.open()
    stage.applied(seq, "legal")
    stage.say(seq, [1] * 20, 5)
    child = stage.worker.fresh()
    stage.worker.op(ForkSequence(seq, child))
    call = stage.worker.save(seq, "kept")
    stage.worker.flush()
    assert stage.answer(call) == CallDone(call, 20)
    stage.texts[child] = stage.texts[seq][:]
    stage.say(child, [2], 5)
    copy = stage.worker.fresh()
    call = stage.worker.open_saved(copy, "a", 1, "kept")
    stage.worker.flush()
    assert stage.answer(call) == CallDone(call, 20)
    stage.texts[copy] = [1] * 20
    stage.say(copy, [3], 5)
    assert stage.engine.adapters.states("a") == [AdapterState("legal", "resident", 4, 1)]


def test_prefix_pages_belong_to_one_adapter(stage: Stage) -> None:
    """Of one tenant: its own prompts under the same adapter hit, all others do not."""
    stage.register("x", 5)
    stage.register("again", 5)
    stage.register("y", 6)
    prompt = [1] * 64
    cached = {}
    for name, contents in (("x", 5), ("x", 5), ("again", 5), ("y", 6), ("", 0), ("", 0)):
        seq = stage.open()
        stage.applied(seq, name)
        result = stage.answer(stage.forward(seq, prompt))
        assert isinstance(result, ForwardDone)
        check_result(prompt, GREEDY, result, contents)
        cached.setdefault(name, []).append(result.cached)
        stage.worker.op(FreeSequence(seq))
        stage.worker.flush()
    # The same weights under another name are the same weights.
    assert cached == {"x": [0, 48], "again": [48], "y": [0], "": [0, 48]}


def test_one_who_changes_to_and_fro_pays_for_what_is_computed_again(stage: Stage) -> None:
    stage.register("x", 5)
    seq = stage.open()
    stage.say(seq, [1] * 100, 0)

    def used() -> int:
        return stage.engine.stats().tenants["a"].minute_tokens

    before = used()
    assert before == 100
    stage.applied(seq, "x")
    assert used() - before == 100
    stage.applied(seq, "")
    # Nothing was computed in between.
    assert used() - before == 100
    stage.engine.set_quota(TenantQuota("a", 200, 150, 4))
    result = stage.applied(seq, "x")
    assert isinstance(result, CallFailed) and result.limit is not None
    assert (result.code, result.limit.name) == (ErrorCode.LIMIT, "tokens_per_minute")


# --- names ------------------------------------------------------------------------------------------------


def test_tenants_cannot_name_each_others_adapters(stage: Stage) -> None:
    stage.register("legal", 5, tenant="b")
    stage.register("common", 6, tenant="")
    seq = stage.open("a")
    unknown = stage.applied(seq, "nothing")
    theirs = stage.applied(seq, "legal")
    assert isinstance(unknown, CallFailed) and isinstance(theirs, CallFailed)
    assert unknown.code == theirs.code == ErrorCode.NOT_FOUND
    # Not even the words differ, but for the name.
    assert unknown.message.replace("nothing", "legal") == theirs.message
    assert stage.loader.reads == 0
    assert stage.engine.adapters.states("a") == []
    assert isinstance(stage.applied(seq, "common"), CallDone)
    stage.say(seq, [1], 6)


def test_ones_own_adapter_goes_before_a_shared_one(stage: Stage) -> None:
    stage.register("legal", 6, tenant="")
    stage.register("legal", 5, tenant="a")
    seq = stage.open("a")
    stage.applied(seq, "legal")
    stage.say(seq, [1], 5)
    other = stage.open("b")
    stage.applied(other, "legal")
    stage.say(other, [1], 6)


def test_equal_files_of_two_tenants_are_loaded_for_each(stage: Stage) -> None:
    """Otherwise the time of a load would tell one that the other has the same."""
    for tenant in "ab":
        stage.register("legal", 5, tenant=tenant)
        seq = stage.open(tenant)
        stage.applied(seq, "legal")
        stage.say(seq, [1], 5)
    assert stage.loader.reads == 2
    assert len(stage.engine.adapters.states("a")) == 1


@pytest.mark.parametrize("name", ["x" * (MAX_ADAPTER_NAME + 1), "x" * 100_000, "\0", "\ud800", "../legal", " legal"])
def test_hostile_names_are_not_found(stage: Stage, name: str) -> None:
    stage.register("legal", 5)
    result = stage.applied(stage.open(), name)
    assert isinstance(result, CallFailed) and result.code == ErrorCode.NOT_FOUND
    assert len(result.message) < 4 * MAX_ADAPTER_NAME + 200


def test_an_unknown_sequence_is_refused(stage: Stage) -> None:
    stage.register("legal", 5)
    for seq in (0, -1, 7, 2 << 40):
        result = stage.applied(seq, "legal")
        assert isinstance(result, CallFailed) and result.code == ErrorCode.BAD_HANDLE


# --- replacing and removing -------------------------------------------------------------------------------


def test_a_replaced_adapter_serves_those_who_have_it(stage: Stage) -> None:
    stage.register("legal", 5)
    old = stage.open()
    stage.applied(old, "legal")
    token = stage.say(old, [1] * 20, 5)
    stage.register("legal", 6)
    new = stage.open()
    stage.applied(new, "legal")
    for _ in range(5):
        token = stage.say(old, [token], 5)
        stage.say(new, [1], 6)
    stage.applied(old, "legal")
    stage.say(old, [2], 6)


def test_registering_the_same_file_again_changes_nothing(stage: Stage) -> None:
    for _ in range(3):
        stage.register("legal", 5)
        seq = stage.open()
        stage.applied(seq, "legal")
        stage.say(seq, [1], 5)
    assert stage.loader.reads == 1


def test_a_removed_adapter_that_is_not_in_memory_any_more_cannot_be_had() -> None:
    stage = Stage(slots=1)
    stage.register("x", 5)
    stage.register("y", 6)
    seq = stage.open()
    stage.applied(seq, "x")
    stage.say(seq, [1] * 20, 5)
    stage.engine.adapters.forget("a", "x")
    other = stage.open()
    stage.applied(other, "y")
    stage.say(other, [1], 6)
    for sequence in stage.engine.scheduler.sequences:
        if sequence.id == seq:
            assert sequence.adapter is not None and sequence.adapter.slot < 0
            sequence.adapter.path = "broken"  # the file is gone
    result = stage.answer(stage.forward(seq, [2]))
    assert isinstance(result, CallFailed) and result.code == ErrorCode.NOT_FOUND and "'x'" in result.message
    # Its tokens are there still, and the base model computes them.
    stage.applied(seq, "")
    stage.say(seq, [2], 0)


def test_nothing_is_left_of_what_nobody_can_ask_for() -> None:
    stage = Stage(slots=1)
    for contents in range(5, 15):
        stage.register("x", contents)
        seq = stage.open()
        stage.applied(seq, "x")
        stage.say(seq, [1], contents)
        stage.worker.op(FreeSequence(seq))
        stage.worker.flush()
    assert len(list(stage.engine.adapters)) <= 2


# --- what cannot be loaded --------------------------------------------------------------------------------


def test_a_broken_adapter_fails_its_own_calls_and_can_be_mended(stage: Stage) -> None:
    stage.register("legal", 5, path="broken")
    seq, other = stage.open(), stage.open()
    stage.say(seq, [1] * 20, 0)
    result = stage.applied(seq, "legal")
    assert isinstance(result, CallFailed) and result.code == ErrorCode.NOT_FOUND
    assert "it is broken" in result.message and "legal" in result.message
    assert stage.engine.adapters.states("a") == [AdapterState("legal", "failed", 0, 0, "it is broken")]
    # Both go on as they were.
    stage.say(seq, [2], 0)
    stage.say(other, [1], 0)
    stage.register("legal", 5)
    assert isinstance(stage.applied(seq, "legal"), CallDone)
    stage.say(seq, [2], 5)


def test_an_adapter_larger_than_the_memory_says_so(stage: Stage) -> None:
    stage.register("huge", 5, 1025)
    result = stage.applied(stage.open(), "huge")
    assert isinstance(result, CallFailed) and result.code == ErrorCode.OUT_OF_MEMORY
    assert "too large" in result.message


def test_an_engine_without_adapters_says_so() -> None:
    engine, _ = checked_engine()
    engine.adapters.register(AdapterFile("a", "legal", "5 256", "5", b""))
    worker = AheadWorker(engine, 1)
    seq = worker.fresh()
    engine.submit(1, [OpenSequence(seq, "a", 1), ApplyAdapter(1, seq, "legal"), ApplyAdapter(2, seq, "")])
    ((results, _),) = engine.take().values()
    assert results[0].code == ErrorCode.NOT_SUPPORTED and results[1] == CallDone(2, 0)  # type: ignore[union-attr]
    engine.close()


# --- nobody else waits ------------------------------------------------------------------------------------


def test_others_go_on_while_an_adapter_is_loaded(stage: Stage) -> None:
    stage.register("legal", 5)
    busy, waiting = stage.open(), stage.open()
    token = stage.say(busy, [1] * 10, 0)
    call = stage.apply(waiting, "legal")
    for _ in range(10):
        # The loader does nothing.
        asked = stage.forward(busy, [token])
        for _ in range(4):
            stage.turn(works=False)
        result = stage.worker.answers.pop(asked)
        assert isinstance(result, ForwardDone)
        stage.texts[busy].append(token)
        check_result(stage.texts[busy], GREEDY, result)
        token = result.token
    assert call not in stage.worker.answers
    assert stage.answer(call) == CallDone(call, 4)
    stage.say(waiting, [1], 5)


def test_an_engine_whose_calls_all_wait_has_nothing_to_launch(stage: Stage) -> None:
    """It must be able to sleep until the loader wakes it."""
    stage.register("legal", 5)
    seq = stage.open()
    stage.applied(seq, "legal")
    stage.turn(works=False)
    assert stage.state("legal") == "loading"
    stage.forward(seq, [1])
    assert not stage.engine.due and not stage.engine.launch()
    assert stage.engine.adapters.waiting


@pytest.mark.parametrize("how", ["free", "end", "drop"])
@pytest.mark.parametrize("what", ["apply", "forward"])
def test_who_leaves_while_it_waits_is_forgotten(how: str, what: str) -> None:
    stage = Stage(slots=1)
    stage.register("x", 5)
    stage.register("y", 6)
    seq = stage.open()
    if what == "forward":
        stage.applied(seq, "x")
        other = stage.open(run=2)
        stage.applied(other, "y")
        stage.say(other, [1], 6)
        call = stage.forward(seq, [1], SamplingParams(mask=b"\xff" * 125))
        stage.turn(works=False)
    else:
        call = stage.apply(seq, "x")
    if how == "free":
        stage.worker.op(FreeSequence(seq))
    elif how == "end":
        stage.worker.op(EndRun(1))
    else:
        stage.engine.drop_worker(1)
    stage.worker.flush()
    stage.worker.asked.pop(call, None)
    for _ in range(20):
        stage.turn()
    assert call not in stage.worker.answers
    assert not stage.engine.adapters.waiting


def test_ones_own_sequence_is_busy_while_it_waits(stage: Stage) -> None:
    stage.register("legal", 5)
    seq = stage.open()
    first = stage.apply(seq, "legal")
    for call in (stage.apply(seq, ""), stage.forward(seq, [1])):
        result = stage.answer(call, 1) if call in stage.worker.answers else None
        if result is None:
            for results, rows in stage.engine.take().values():
                stage.worker.receive(results, rows)
            result = stage.worker.answers.pop(call)
        assert isinstance(result, CallFailed) and result.code == ErrorCode.BAD_HANDLE
    assert stage.answer(first) == CallDone(first, 4)


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


def test_save_sequence_waits_its_turn(stage: Stage) -> None:
    stage.register("legal", 5)
    seq = stage.open()
    stage.apply(seq, "legal")
    call = stage.worker.call()
    stage.worker.asked[call] = (seq, None)
    stage.worker.op(SaveSequence(call, seq, "kept"))
    stage.worker.op(OpenSaved(0, 1, "a", 1, "none"))
    stage.worker.asked[0] = (seq, None)
    stage.worker.flush()
    result = stage.answer(call)
    assert isinstance(result, CallFailed) and result.code == ErrorCode.BAD_HANDLE
