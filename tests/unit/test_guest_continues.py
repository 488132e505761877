"""Guests that go on as before: rows in place of messages, and nothing that a guest could tell them by."""

from __future__ import annotations

import struct
from dataclasses import dataclass

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from realm.guests import abi
from realm.guests.abi import ErrorCode
from realm.messages import DRAWN, NO_LANE, CallFailed, EngineReply, Forward, SaveSequence
from realm.run_messages import RunFinished
from tests.fakes import FACTS, Host
from tests.wat import GENERATE, expected, guest, sampling

# Where the guests of this file keep things.
TOKENS, SAMPLINGS, ITEMS, ANSWER = 512, 1024, 2048, 700
SIZE = abi.SAMPLING.size
MASK_AT, BIAS_AT = 3000, 3100
KINDS = [
    sampling(1.0),
    sampling(0.7, top_k=5),
    sampling(),
    sampling(1.0, flags=4, seed=9),
    sampling(1.0, flags=2),
    sampling(1.0, mask=MASK_AT, mask_words=FACTS.mask_words),
    sampling(1.0, bias=BIAS_AT, bias_count=1),
    sampling(-1.0),
]
NAMES = (
    *("seq_new", "seq_fork", "seq_truncate", "seq_len", "seq_save"),
    *("forward", "batch_forward", "lora_apply", "sample", "emit"),
)


@dataclass(frozen=True)
class Action:
    """``which`` sequence, 0 or 1; ``kind`` of :data:`KINDS`, or -1 for none; ``value`` for what needs one."""

    what: str
    which: int
    kind: int
    value: int

    def wat(self) -> str:
        seq, token = ("$a", "$b")[self.which], TOKENS + 4 * self.which
        params = 0 if self.kind < 0 else SAMPLINGS + SIZE * self.kind
        match self.what:
            case "forward":
                call = f"(call $forward (local.get {seq}) (i32.const {token}) (i32.const 1) (i32.const {params})"
                return f"""(local.set $c {call} (i32.const {ANSWER})))
                  (if (i32.ge_s (local.get $c) (i32.const 0)) (then (i32.store (i32.const {token}) (local.get $c))))
                  (drop (call $emit (i32.const {ANSWER}) (i32.const {abi.TOKEN.size})))"""
            case "change":
                return f"(i32.store (i32.const {token}) (i32.const {self.value}))"
            case "fork":
                other, at = ("$b", "$a")[self.which], TOKENS + 4 * (1 - self.which)
                return f"""(local.set {other} (call $seq_fork (local.get {seq})))
                  (i32.store (i32.const {at}) (i32.load (i32.const {token})))"""
            case "truncate":
                length = f"(i32.sub (call $seq_len (local.get {seq})) (i32.const {self.value}))"
                return f"(drop (call $seq_truncate (local.get {seq}) {length}))"
            case "save":
                return f"(drop (call $seq_save (local.get {seq}) (i32.const 100) (i32.const 1)))"
            case "adapter":
                # The name that there is, none, or one that there is not.
                name, size = (100, self.value % 2) if self.value < 4 else (101, 1)
                return f"(drop (call $lora_apply (local.get {seq}) (i32.const {name}) (i32.const {size})))"
            case "sample":
                return f"(drop (call $sample (local.get {seq}) (i32.const {params}) (i32.const 0)))"
            case _:
                return self._batch(params)

    def _batch(self, params: int) -> str:
        body = ""
        for which, name in enumerate(("$a", "$b")):
            at = ITEMS + which * abi.ITEM.size
            body += f"""(i32.store (i32.const {at}) (local.get {name})) (i32.store (i32.const {at + 4}) (i32.const 1))
              (i64.store (i32.const {at + 8}) (i64.const {TOKENS + 4 * which}))
              (i64.store (i32.const {at + 16}) (i64.const {params}))"""
        body += f"(drop (call $batch_forward (i32.const {ITEMS}) (i32.const 2)))"
        for which in range(2):
            at = ITEMS + which * abi.ITEM.size + 24
            body += f"""(drop (call $emit (i32.const {at}) (i32.const 16)))
              (if (i32.ge_s (i32.load (i32.const {at})) (i32.const 0))
                (then (i32.store (i32.const {TOKENS + 4 * which}) (i32.load (i32.const {at})))))"""
        return body


def program(actions: list[Action]) -> str:
    def text(data: bytes) -> str:
        return "".join(f"\\{byte:02x}" for byte in data)

    data = f'(data (i32.const {SAMPLINGS}) "{text(b"".join(KINDS))}")'
    data += f'(data (i32.const {MASK_AT}) "{text(bytes([170]) * 16)}")'
    data += f'(data (i32.const {BIAS_AT}) "{text(struct.pack("<If", 7, 2.0))}") (data (i32.const 100) "nx")'
    data += f'(data (i32.const {TOKENS}) "{text(struct.pack("<II", 5, 6))}")'
    body = "(local.set $a (call $seq_new)) (local.set $b (call $seq_new))"
    return guest(body + "".join(a.wat() for a in actions) + "(i32.const 0)", *NAMES, extra=data)


ACTIONS = st.builds(
    Action,
    st.sampled_from(["forward"] * 8 + ["batch"] * 4 + ["change", "fork", "truncate", "save", "sample", "adapter"]),
    st.integers(0, 1),
    st.sampled_from([0, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, -1]),
    st.integers(0, 4),
)
GO_ON = [Action("forward", 0, 0, 0)] * 3


def forwards(host: Host) -> list[tuple[object, ...]]:
    """What the engine was asked to compute, by sequence; a row stands for the message that says the same."""
    ops = sorted(host.engine.forwards, key=lambda op: op.seq)
    return [(op.seq, op.tokens, op.sampling, op.want_logits) for op in ops] + sorted(host.engine.applied)


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(ACTIONS, max_size=14))
@example([*GO_ON, Action("fork", 0, 0, 0), *GO_ON, Action("forward", 1, 0, 0)])
@example([*GO_ON, Action("save", 0, 0, 0), *GO_ON])
@example([*GO_ON, Action("truncate", 0, 0, 0), *GO_ON])
@example([*GO_ON, Action("adapter", 0, 0, 1), *GO_ON, Action("adapter", 0, 0, 0), *GO_ON])
@example([*GO_ON, Action("adapter", 0, 0, 4), *GO_ON])
@example([*GO_ON, Action("adapter", 0, 0, 1), Action("fork", 0, 0, 0), *GO_ON, *[Action("batch", 0, 0, 0)] * 3])
@example([*GO_ON, Action("change", 0, 0, 3), *GO_ON])
@example([*GO_ON, Action("forward", 0, 4, 0), Action("sample", 0, 0, 0), *GO_ON])
@example([Action("batch", 0, 2, 0)] * 3 + [Action("batch", 0, 3, 0)] * 3)
@example(GO_ON * 25)
def test_rows_and_messages_say_the_same(actions: list[Action]) -> None:
    wat = program(actions)
    ends: list[RunFinished] = []
    hosts = [Host(rows=rows) for rows in (True, False)]
    for host in hosts:
        host.engine.adapters["n"] = 8
        ends.append(host.run(wat))
        host.turn()
        host.check_empty()
    rows, messages = hosts
    assert forwards(rows) == forwards(messages)
    assert rows.output(1) == messages.output(1)
    assert rows.logs(1) == messages.logs(1)
    assert ends[0] == ends[1]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_streaming_guest_goes_on_by_rows(temperature: float) -> None:
    host = Host()
    assert host.run(GENERATE, input=sampling(temperature)).code == 0
    # The first is a message, and so is what follows an answer without a lane.
    assert host.engine.continues == 12 - 1 - 2
    numbers = [op.sampling.number for op in host.engine.forwards if op.sampling is not None]
    assert numbers == (list(range(12)) if temperature else [-1] * 12)
    if not temperature:
        assert host.output(1) == expected()


@pytest.mark.parametrize(
    ("kind", "rows"), [(0, True), (1, True), (2, True), (3, True), (4, False), (5, False), (6, False), (-1, False)]
)
def test_what_a_row_cannot_repeat_is_a_message(kind: int, rows: bool) -> None:
    host = Host()
    assert host.run(program([Action("forward", 0, kind, 0)] * 4)).code == 0
    assert len(host.engine.forwards) == 4
    assert (host.engine.continues > 0) == rows


def test_a_refused_row_leaves_the_sequence_as_it_was() -> None:
    """The engine has no page: the token is taken back, and the guest's next try is a message."""
    host = Host()

    def fail(op: Forward) -> CallFailed | None:
        return CallFailed(op.call, ErrorCode.OUT_OF_MEMORY, "no page") if len(host.engine.forwards) == 2 else None

    host.engine.fail = fail
    end = host.run(program([*GO_ON, Action("change", 0, 0, 8), *GO_ON]))
    lengths = [length for _, _, length, _ in struct.iter_unpack("<ifII", host.output(1))]
    # The refused call writes no answer, so that the guest emits the one before again.
    assert lengths == [1, 1, 2, 3, 4, 5]
    numbers = [op.sampling.number for op in host.engine.forwards if op.sampling is not None]
    assert numbers == [0, 1, 2, 3, 4, 5]
    assert host.engine.continues == 1 + 1
    # The first token, the one that was taken back, and the one that was not drawn.
    assert (end.usage.new_tokens, end.usage.prompt_tokens) == (5, 3)


def test_limits_hold_for_rows_too() -> None:
    host = Host()
    end = host.run(program([Action("forward", 0, 0, 0)] * 6), tokens=3)
    assert len(host.engine.forwards) == 3
    assert end.usage.new_tokens == 3
    assert [text for _, text in host.logs(1)] == ["forward: no room for 1 more tokens (limit 3, used 3)"] * 3
    full = Host()
    end = full.run(program([Action("forward", 0, 0, 0)] * (FACTS.context_length + 2)))
    assert end.usage.new_tokens == FACTS.context_length
    assert "the context is" in full.logs(1)[0][1]


def test_rows_for_nobody_are_dropped() -> None:
    host = Host()
    run = host.start(GENERATE, input=sampling())
    host.turn(engine=False)
    rows = DRAWN.pack(1 << 60, 5, 0.0, 0, 1) + host.engine.take()[1]
    host.runtime.deliver(EngineReply(1, [], rows * 2))
    host.runtime.check()
    host.settle()
    assert host.output(run) == expected()


def test_a_row_that_answers_another_kind_of_call_ends_the_call_not_the_worker() -> None:
    host = Host()
    run = host.start(program([Action("save", 0, 0, 0), *GO_ON]))
    (save,) = [op for op in host.turn(engine=False).ops if isinstance(op, SaveSequence)]
    host.engine.results.clear()
    host.runtime.deliver(EngineReply(1, [], DRAWN.pack(save.call, 5, 0.0, 0, NO_LANE)))
    host.settle()
    end = host.finished(run)
    assert end is not None
    assert end.code == 0
    assert "the host failed" in host.logs(run)[0][1]


def test_a_batch_may_be_answered_by_rows_and_messages() -> None:
    host = Host()
    run = host.start(program([Action("batch", 0, 0, 0)]))
    first, second = [op for op in host.turn(engine=False).ops if isinstance(op, Forward)]
    host.engine.results.clear()
    host.runtime.deliver(EngineReply(1, [CallFailed(second.call, -6, "no")], DRAWN.pack(first.call, 9, 0.5, 0, 3)))
    host.turn(engine=False)
    assert [row[0] for row in struct.iter_unpack("<ifII", host.output(run))] == [9, -6]
