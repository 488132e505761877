"""Adapters in the engine's core: who has which, and what is told to whom (a checked runner computes)."""

from __future__ import annotations

import pytest

from realm.engine.adapter import MAX_ADAPTER_NAME
from realm.guests.abi import ErrorCode
from realm.messages import (
    AdapterFile,
    AdapterState,
    ApplyAdapter,
    CallDone,
    CallFailed,
    EndRun,
    ForkSequence,
    ForwardDone,
    FreeSequence,
    OpenSaved,
    OpenSequence,
    SamplingParams,
    SaveSequence,
    TenantQuota,
)
from tests.adapter_stage import GREEDY, Stage
from tests.ahead_worker import AheadWorker
from tests.checked_runner import check_result, checked_engine


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
