"""``lora_apply``: what it asks of the engine, what it changes for the guest, and what it refuses."""

from __future__ import annotations

import struct
from typing import Any

import pytest

from realm.guests import abi
from realm.guests.abi import ErrorCode
from realm.messages import DRAWN, NO_LANE, ApplyAdapter, CallDone, CallFailed, EngineReply, ForwardDone, LimitMet
from realm.run_messages import CancelRun
from tests import probe
from tests.fakes import Host, greedy
from tests.probe import INPUT_AT, MEMORY, call
from tests.wat import guest

NAMES = "seq_new", "seq_fork", "seq_len", "seq_save", "seq_open", "forward", "batch_forward", "lora_apply", "emit"
LEGAL, POET = "legal", "poét"
LEGAL_AT, POET_AT, TOKENS_AT, GREEDY_AT, ITEMS_AT, OUT_AT = 100, 120, 512, 600, 2048, 4096


def host_with(**ranks: int) -> Host:
    """A host whose engine has these adapters."""
    host = Host()
    host.engine.adapters.update(ranks or {LEGAL: 8, POET: 16})
    return host


def program(body: str, *more: str) -> str:
    """A guest with two adapters' names, and tokens 5 and 6, in its memory; ``more`` are further imports."""
    data = f'(data (i32.const {LEGAL_AT}) "{LEGAL}") (data (i32.const {POET_AT}) "{POET}") '
    data += f'(data (i32.const {TOKENS_AT}) "\\05\\00\\00\\00\\06\\00\\00\\00")'
    return guest(body + "(i32.const 0)", *NAMES, *more, extra=data)


def apply(seq: str, name: str) -> str:
    at = {LEGAL: LEGAL_AT, POET: POET_AT}.get(name, 0)
    return f"(call $lora_apply (local.get {seq}) (i32.const {at}) (i32.const {len(name.encode())}))"


def forward(seq: str, count: int = 1, sampling: int = GREEDY_AT) -> str:
    """Its token is emitted in four bytes and is the next one to forward."""
    return f"""(i32.store (i32.const {TOKENS_AT}) (call $forward (local.get {seq}) (i32.const {TOKENS_AT})
        (i32.const {count}) (i32.const {sampling}) (i32.const 0)))
      (drop (call $emit (i32.const {TOKENS_AT}) (i32.const 4)))"""


def show(value: str) -> str:
    return f"(i32.store (i32.const {OUT_AT}) {value}) (drop (call $emit (i32.const {OUT_AT}) (i32.const 4)))"


def shown(host: Host, run: int = 1) -> list[int]:
    return [value for (value,) in struct.iter_unpack("<i", host.output(run))]


def ran(host: Host, body: str, *more: str, **options: Any) -> list[int]:
    """Runs a guest to its end; what it has shown."""
    end = host.run(program(body, *more), **options)
    assert (end.outcome, end.code) == ("complete", 0), end.error
    host.turn()
    host.check_empty()
    return shown(host, end.run)


NEW = "(local.set $a (call $seq_new))"

# --- what it does -----------------------------------------------------------------------------------


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("name", [LEGAL, POET])
def test_the_engine_is_asked_and_the_answer_is_zero(name: str, wide: bool) -> None:
    host, data = host_with(), name.encode()
    answer = call("lora_apply", 1, INPUT_AT, len(data), blob={INPUT_AT: data}, host=host, wide=wide)
    assert answer.result == 0
    assert answer.untouched
    assert [applied for _, applied in host.engine.applied] == [name]
    assert host.logs(answer.run) == []


def test_it_waits_for_the_engine() -> None:
    host = host_with()
    run = host.start(program(NEW + apply("$a", LEGAL).join(["(drop ", ")"])))
    (op,) = [op for op in host.turn(engine=False).ops if isinstance(op, ApplyAdapter)]
    assert op.name == LEGAL
    for _ in range(3):
        assert not host.turn(engine=False).ops
    assert host.finished(run) is None
    host.deliver()
    host.settle()
    assert host.finished(run) is not None


def test_tokens_come_from_the_adapter_from_then_on() -> None:
    first = greedy([5])
    second = greedy([5, first], LEGAL)
    third = greedy([5, first, second], LEGAL)
    last = greedy([5, first, second, third])
    body = f"{NEW} {forward('$a')} {show(apply('$a', LEGAL))} {forward('$a')} {forward('$a')}"
    body += f"{show(apply('$a', ''))} {forward('$a')} {show('(call $seq_len (local.get $a))')}"
    assert ran(host_with(), body) == [first, 0, second, third, 0, last, 4]


def test_an_empty_sequence_may_have_one() -> None:
    body = f"{NEW} {show(apply('$a', POET))} {show('(call $seq_len (local.get $a))')} {forward('$a', 2)}"
    assert ran(host_with(), body) == [0, 0, greedy([5, 6], POET)]


def test_the_empty_name_needs_no_pointer_and_no_adapter() -> None:
    host = Host()
    assert ran(host, NEW + show("(call $lora_apply (local.get $a) (i32.const 0) (i32.const 0))")) == [0]
    assert host.engine.applied[0][1] == ""


def test_kept_logits_go_and_length_stays() -> None:
    """They are what another model said: nobody may take them for the adapter's."""
    scored = "(call $score (local.get $a) (i32.const 512) (i32.const 1) (i32.const 4096) (i32.const 1))"
    length = "(call $seq_len (local.get $a))"
    kept = f"(call $forward (local.get $a) (i32.const {TOKENS_AT}) (i32.const 2) (i32.const 0) (i32.const 0))"
    body = f"{NEW} (drop {kept}) {show(scored)} {show(apply('$a', LEGAL))} {show(scored)} {show(length)}"
    assert ran(host_with(), body, "score") == [1, 0, ErrorCode.NO_LOGITS, 2]


def test_the_token_that_was_drawn_counts_as_given() -> None:
    """The worker's counters: after a change of the model no token is the one that this model drew."""
    host = host_with()
    end = host.run(program(f"{NEW} {forward('$a')} {forward('$a')}"))
    assert (end.usage.prompt_tokens, end.usage.new_tokens) == (1, 2)
    end = host.run(program(f"{NEW} {forward('$a')} (drop {apply('$a', LEGAL)}) {forward('$a')}"))
    assert (end.usage.prompt_tokens, end.usage.new_tokens) == (2, 2)


def test_draws_go_on_where_they_were() -> None:
    host = host_with()
    body = f"(f32.store (i32.const {GREEDY_AT}) (f32.const 1)) {NEW} {forward('$a')} (drop {apply('$a', LEGAL)})"
    ran(host, body + forward("$a") + forward("$a"))
    assert [op.sampling.number for op in host.engine.forwards if op.sampling] == [0, 1, 2]


@pytest.mark.parametrize("name", [LEGAL, "", "none"])
def test_the_next_forward_is_a_message_and_not_a_row(name: str) -> None:
    """Also when it was refused: the sequence was asked for something else than to go on."""
    host = host_with()
    drop = f"(drop {apply('$a', name)})"
    if name == "none":
        drop = f"(drop (call $lora_apply (local.get $a) (i32.const {LEGAL_AT}) (i32.const 4)))"
    run = host.start(program(f"{NEW} {forward('$a')} {forward('$a')} {drop} {forward('$a')} {forward('$a')}"))
    kinds = []
    while host.finished(run) is None:
        turn = host.turn()
        kinds += ["row"] if turn.continues else []
        kinds += [type(op).__name__ for op in turn.ops]
    assert kinds == ["OpenSequence", "Forward", "row", "ApplyAdapter", "Forward", "row", "EndRun"]


def test_two_sequences_of_a_batch_have_different_ones() -> None:
    items = ""
    for number, seq in enumerate(("$a", "$b", "$c")):
        at = ITEMS_AT + number * abi.ITEM.size
        items += f"""(i32.store (i32.const {at}) (local.get {seq})) (i32.store (i32.const {at + 4}) (i32.const 2))
          (i64.store (i32.const {at + 8}) (i64.const {TOKENS_AT}))
          (i64.store (i32.const {at + 16}) (i64.const {GREEDY_AT}))"""
    made = "".join(f"(local.set {seq} (call $seq_new))" for seq in ("$a", "$b", "$c"))
    drawn = "".join(show(f"(i32.load (i32.const {ITEMS_AT + number * 40 + 24}))") for number in range(3))
    body = f"""{made} (drop {apply("$a", LEGAL)}) (drop {apply("$c", POET)}) {items}
      {show(f"(call $batch_forward (i32.const {ITEMS_AT}) (i32.const 3))")} {drawn}"""
    host = host_with()
    assert ran(host, body) == [3, greedy([5, 6], LEGAL), greedy([5, 6]), greedy([5, 6], POET)]


def test_a_fork_has_its_parents_and_each_may_change() -> None:
    first = greedy([5], LEGAL)
    fork = "(local.set $b (call $seq_fork (local.get $a)))"
    keep = f"(local.set $c (i32.load (i32.const {TOKENS_AT})))"
    again = f"(i32.store (i32.const {TOKENS_AT}) (local.get $c))"
    body = f"""{NEW} (drop {apply("$a", LEGAL)}) {forward("$a")} {fork} {keep}
      {forward("$b")} {again} (drop {apply("$a", POET)}) {forward("$a")} {forward("$b")}"""
    second, other = greedy([5, first], LEGAL), greedy([5, first], POET)
    assert ran(host_with(), body) == [first, second, other, greedy([5, first, other], LEGAL)]


def test_a_fork_keeps_its_logits_when_its_parent_changes() -> None:
    scored = "(call $score (local.get $b) (i32.const 512) (i32.const 1) (i32.const 4096) (i32.const 1))"
    kept = f"(call $forward (local.get $a) (i32.const {TOKENS_AT}) (i32.const 2) (i32.const 0) (i32.const 0))"
    fork = "(local.set $b (call $seq_fork (local.get $a)))"
    assert ran(host_with(), f"{NEW} (drop {kept}) {fork} (drop {apply('$a', LEGAL)}) {show(scored)}", "score") == [1]


def test_a_saved_copy_has_it_too() -> None:
    first = greedy([5], LEGAL)
    save = f"(drop (call $seq_save (local.get $a) (i32.const {POET_AT}) (i32.const 1)))"
    load = f"(local.set $b (call $seq_open (i32.const {POET_AT}) (i32.const 1)))"
    body = f"{NEW} (drop {apply('$a', LEGAL)}) {forward('$a')} {save} (drop {apply('$a', '')}) {load} {forward('$b')}"
    assert ran(host_with(), body) == [first, greedy([5, first], LEGAL)]


# --- what it refuses --------------------------------------------------------------------------------


def test_an_unknown_name_is_not_found_and_changes_nothing() -> None:
    first = greedy([5], LEGAL)
    unknown = f"(call $lora_apply (local.get $a) (i32.const {LEGAL_AT}) (i32.const 3))"
    body = f"{NEW} (drop {apply('$a', LEGAL)}) {forward('$a')} {show(unknown)} {forward('$a')}"
    host = host_with()
    assert ran(host, body) == [first, ErrorCode.NOT_FOUND, greedy([5, first], LEGAL)]
    assert host.logs(1) == [("warning", "lora_apply: there is no adapter 'leg'")]


def test_a_refused_call_leaves_the_kept_logits() -> None:
    scored = "(call $score (local.get $a) (i32.const 512) (i32.const 1) (i32.const 4096) (i32.const 1))"
    kept = f"(call $forward (local.get $a) (i32.const {TOKENS_AT}) (i32.const 2) (i32.const 0) (i32.const 0))"
    assert ran(Host(), f"{NEW} (drop {kept}) {show(apply('$a', LEGAL))} {show(scored)}", "score") == [-7, 1]


def test_a_limit_is_named() -> None:
    host = host_with()
    run = host.start(program(f"{NEW} (return {apply('$a', LEGAL)})"))
    (op,) = [op for op in host.turn(engine=False).ops if isinstance(op, ApplyAdapter)]
    host.engine.results.clear()
    limit = LimitMet("tokens_per_minute", 40, 41, 2.5)
    host.runtime.deliver(EngineReply(1, [CallFailed(op.call, ErrorCode.LIMIT, "too many tokens", limit)]))
    host.settle()
    end = host.finished(run)
    assert end is not None and end.error is not None
    assert (end.code, end.error.details["name"]) == (ErrorCode.LIMIT, "tokens_per_minute")
    assert ("warning", "lora_apply: too many tokens") in host.logs(run)


NOT_UTF8 = [b"\xff", b"abc\x80", b"\xc3", b"\xed\xa0\x80", b"\xc0\xaf", b"\xf4\x90\x80\x80", b"leg\xe2\x82"]


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("name", NOT_UTF8, ids=repr)
def test_a_name_must_be_utf8(name: bytes, wide: bool) -> None:
    host = host_with()
    answer = call("lora_apply", 1, INPUT_AT, len(name), blob={INPUT_AT: name}, host=host, wide=wide)
    assert answer.result == ErrorCode.BAD_UTF8
    assert host.engine.applied == []
    assert "is not UTF-8 at byte" in host.logs(answer.run)[0][1]


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize(
    ("seq", "pointer", "length", "code"),
    [
        (0, INPUT_AT, 5, ErrorCode.BAD_HANDLE),
        (2, INPUT_AT, 5, ErrorCode.BAD_HANDLE),
        (-1, INPUT_AT, 5, ErrorCode.BAD_HANDLE),
        (-(2**31), INPUT_AT, 5, ErrorCode.BAD_HANDLE),
        (1, INPUT_AT, 129, ErrorCode.INVALID_ARGUMENT),
        (1, INPUT_AT, 2**31, ErrorCode.INVALID_ARGUMENT),
        (1, INPUT_AT, 2**32 - 1, ErrorCode.INVALID_ARGUMENT),
        (1, MEMORY - 4, 5, ErrorCode.BAD_POINTER),
        (1, MEMORY, 1, ErrorCode.BAD_POINTER),
        (1, MEMORY + 1, 0, ErrorCode.BAD_POINTER),
        (1, 2**32 - 1, 1, ErrorCode.BAD_POINTER),
        (1, 2**32 - 1, 0, ErrorCode.BAD_POINTER),
    ],
)
def test_bad_arguments_never_reach_the_engine(seq: int, pointer: int, length: int, code: ErrorCode, wide: bool) -> None:
    host = host_with()
    answer = call("lora_apply", seq, pointer, length, blob={INPUT_AT: b"legal"}, host=host, wide=wide)
    assert answer.result == code
    assert host.engine.applied == []
    assert len(host.logs(answer.run)) == 1


@pytest.mark.parametrize("name", ["n" * 128, "é" * 64, "\0", "legal\0", "../legal", "b/legal", "\x1b[2J", " legal"])
def test_any_other_name_is_the_engines_to_look_up_as_it_is(name: str) -> None:
    """Nothing is cut, folded or joined to a path on the way."""
    host, data = host_with(), name.encode()
    answer = call("lora_apply", 1, INPUT_AT, len(data), blob={INPUT_AT: data}, host=host)
    assert answer.result == ErrorCode.NOT_FOUND
    assert [applied for _, applied in host.engine.applied] == [name]


@pytest.mark.parametrize("kind", ["row", "forward"])
def test_an_answer_of_another_kind_ends_the_call_not_the_worker(kind: str) -> None:
    host = host_with()
    run = host.start(program(f"{NEW} (return {apply('$a', LEGAL)})"))
    (op,) = [op for op in host.turn(engine=False).ops if isinstance(op, ApplyAdapter)]
    host.engine.results.clear()
    if kind == "row":
        host.runtime.deliver(EngineReply(1, [], DRAWN.pack(op.call, 5, 0.0, 0, NO_LANE)))
    else:
        host.runtime.deliver(EngineReply(1, [ForwardDone(op.call, 5, 0.0, 0)]))
    host.settle()
    end = host.finished(run)
    assert end is not None and end.code == ErrorCode.INTERNAL


def test_a_run_that_is_cancelled_meanwhile_is_gone() -> None:
    host = host_with()
    run = host.start(program(f"{NEW} (drop {apply('$a', LEGAL)}) {forward('$a')}"))
    (op,) = [op for op in host.turn(engine=False).ops if isinstance(op, ApplyAdapter)]
    host.engine.results.clear()
    host.runtime.cancel(CancelRun(run, "the client"))
    for _ in range(3):
        host.turn(engine=False)
    host.now += 60
    host.settle()
    end = host.finished(run)
    assert end is not None and end.outcome == "cancelled"
    # The adapter is there too late: nobody waits for it.
    host.runtime.deliver(EngineReply(1, [CallDone(op.call, 8)]))
    host.turn()
    host.check_empty()
    assert host.engine.forwards == []


def test_changing_adapters_costs_fuel() -> None:
    """A guest that does nothing else ends as one that does nothing else with any function."""
    host = host_with()
    loop = f"(loop $l (drop {apply('$a', LEGAL)}) (drop {apply('$a', '')}) (br $l))"
    end = host.run(program(NEW + loop), fuel=1_000_000)
    assert end.error is not None and end.error.code == "fuel_exhausted"
    assert 50 < len(host.engine.applied) < 1_000_000 / 5000


def test_a_guest_may_name_it_at_the_end_of_its_memory() -> None:
    store = f"(i32.store8 (i32.const {MEMORY - 1}) (i32.const {ord('x')}))"
    name = f"(call $lora_apply (local.get $a) (i32.const {MEMORY - 1}) (i32.const 1))"
    nothing = f"(call $lora_apply (local.get $a) (i32.const {MEMORY}) (i32.const 0))"
    assert ran(host_with(x=1), NEW + store + show(name) + show(nothing)) == [0, 0]
    assert probe.MEMORY == 65_536
