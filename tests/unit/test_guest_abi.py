"""Every function of the guest ABI: what it does, and what it refuses."""

from __future__ import annotations

import math
import struct
from array import array

import numpy as np
import pytest

from realm.guests import abi
from realm.guests.abi import ErrorCode
from realm.guests.draws import stream_key
from realm.guests.sampling_reference import log_probabilities, most_likely
from realm.messages import CallFailed, Forward
from tests import probe
from tests.fakes import CONTEXT, FACTS, VOCAB, FakeTokenizer, Host, greedy, logits_of
from tests.probe import ANSWER_AT, INPUT_AT, ITEMS_AT, MEMORY, OUTPUT_AT, STRUCT_AT, TOKENS_AT, call

SAMPLING_NAMES = [f.name for f in abi.SAMPLING.fields]


def sampling(**values: float) -> bytes:
    return struct.pack(abi.SAMPLING.format, *[values.get(name, 0) for name in SAMPLING_NAMES])


def u32(*values: int) -> bytes:
    return array("I", values).tobytes()


# --- forward --------------------------------------------------------------------------------------


def test_forward_draws_greedily_and_says_what() -> None:
    answer = call(
        "forward", 1, TOKENS_AT, 2, STRUCT_AT, ANSWER_AT, blob={TOKENS_AT: u32(7, 8), STRUCT_AT: sampling(flags=1)}
    )
    token = greedy([5, 6, 7, 8])
    assert answer.result == token
    drawn = answer.fields(abi.TOKEN, ANSWER_AT)
    expected = log_probabilities(logits_of([5, 6, 7, 8]), np.array([token]))[0]
    assert (drawn["token"], drawn["length"], drawn["flags"]) == (token, 4, 0)
    assert drawn["logprob"] == pytest.approx(expected, abs=1e-5)


def test_forward_without_sampling_keeps_logits() -> None:
    answer = call("forward", 1, TOKENS_AT, 1, 0, ANSWER_AT, blob={TOKENS_AT: u32(7)})
    assert answer.result == 0
    drawn = answer.fields(abi.TOKEN, ANSWER_AT)
    assert drawn["token"] == -1
    assert math.isnan(drawn["logprob"])
    assert answer.host.engine.forwards[-1].want_logits


def test_forward_says_that_a_token_ends_the_text() -> None:
    bias = struct.pack(abi.BIAS.format, 2, 1000.0)
    blob = {TOKENS_AT: u32(7), STRUCT_AT: sampling(bias=INPUT_AT, bias_count=1), INPUT_AT: bias}
    answer = call("forward", 1, TOKENS_AT, 1, STRUCT_AT, ANSWER_AT, blob=blob)
    assert answer.result == 2
    assert answer.fields(abi.TOKEN, ANSWER_AT)["flags"] == 1


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": math.nan}, "temperature"),
        ({"temperature": math.inf}, "temperature"),
        ({"temperature": 100.5}, "temperature"),
        ({"top_p": 1.5}, "top_p"),
        ({"top_p": math.nan}, "top_p"),
        ({"min_p": -1}, "min_p"),
        ({"min_p": 1.01}, "min_p"),
        ({"repetition_penalty": -2}, "repetition_penalty"),
        ({"repetition_penalty": math.inf}, "repetition_penalty"),
        ({"flags": 8}, "flags"),
        ({"mask_words": 4}, "mask_words"),
        ({"mask": INPUT_AT, "mask_words": 3}, "mask_words"),
        ({"mask": INPUT_AT, "mask_words": 2**32 - 1}, "mask_words"),
        ({"mask": INPUT_AT, "mask_words": 4}, "allows no token"),
        ({"bias_count": 4097, "bias": INPUT_AT}, "bias_count"),
    ],
)
@pytest.mark.parametrize("name", ["forward", "sample"])
def test_sampling_values_are_checked(name: str, change: dict[str, float], says: str) -> None:
    arguments = [1, TOKENS_AT, 1, STRUCT_AT, 0] if name == "forward" else [1, STRUCT_AT, 0]
    answer = call(name, *arguments, blob={TOKENS_AT: u32(7), STRUCT_AT: sampling(**change)})
    assert answer.result == ErrorCode.INVALID_ARGUMENT
    assert says in answer.host.logs(answer.run)[0][1]


@pytest.mark.parametrize(
    "change",
    [
        {"mask": 2**64 - 8, "mask_words": 4},
        {"mask": MEMORY - 15, "mask_words": 4},
        {"bias": 2**63, "bias_count": 1},
        {"bias": MEMORY - 7, "bias_count": 1},
        {"bias": MEMORY, "bias_count": 1},
    ],
)
def test_pointers_inside_structs_are_checked(change: dict[str, float]) -> None:
    answer = call("forward", 1, TOKENS_AT, 1, STRUCT_AT, 0, blob={TOKENS_AT: u32(7), STRUCT_AT: sampling(**change)})
    assert answer.result == ErrorCode.BAD_POINTER


@pytest.mark.parametrize(
    "entry", [(VOCAB, 1.0), (2**32 - 1, 1.0), (3, math.nan), (3, math.inf)], ids=["vocab", "huge", "nan", "inf"]
)
def test_bias_entries_are_checked(entry: tuple[int, float]) -> None:
    blob = {
        TOKENS_AT: u32(7),
        STRUCT_AT: sampling(bias=INPUT_AT, bias_count=1),
        INPUT_AT: struct.pack(abi.BIAS.format, *entry),
    }
    assert call("forward", 1, TOKENS_AT, 1, STRUCT_AT, 0, blob=blob).result == ErrorCode.INVALID_ARGUMENT


def test_a_mask_is_obeyed() -> None:
    blob = {
        TOKENS_AT: u32(7),
        STRUCT_AT: sampling(mask=INPUT_AT, mask_words=4),
        INPUT_AT: (1 << 77).to_bytes(16, "little"),
    }
    assert call("forward", 1, TOKENS_AT, 1, STRUCT_AT, 0, blob=blob).result == 77


@pytest.mark.parametrize("token", [VOCAB, 2**31, 2**32 - 1])
@pytest.mark.parametrize("count", [1, 3, 100])
def test_tokens_must_be_in_the_vocabulary(token: int, count: int) -> None:
    tokens = [1] * (count - 1) + [token]
    answer = call("forward", 1, TOKENS_AT, count, 0, 0, blob={TOKENS_AT: u32(*tokens)})
    assert answer.result == ErrorCode.INVALID_ARGUMENT
    assert not answer.host.engine.forwards[1:]


def test_a_prompt_longer_than_the_context_is_refused_with_numbers() -> None:
    count = CONTEXT - 1
    answer = call("forward", 1, TOKENS_AT, count, 0, 0, blob={TOKENS_AT: u32(*[3] * count)})
    assert answer.result == ErrorCode.CONTEXT_FULL
    assert answer.host.logs(answer.run)[0][1] == "forward: the sequence would have 65 tokens; the context is 64"


def test_an_engine_failure_leaves_the_sequence_as_it_was() -> None:
    host = Host()
    host.engine.fail = lambda op: (
        CallFailed(op.call, ErrorCode.OUT_OF_MEMORY, "too few pages") if len(host.engine.forwards) > 1 else None
    )
    answer = call("forward", 1, TOKENS_AT, 1, 0, ANSWER_AT, blob={TOKENS_AT: u32(3)}, host=host)
    assert answer.result == ErrorCode.OUT_OF_MEMORY
    assert answer.untouched
    assert "too few pages" in host.logs(answer.run)[0][1]


def test_batch_forward_answers_each_item() -> None:
    items = [
        (1, 1, TOKENS_AT, STRUCT_AT, 0, 0.0, 0, 0),
        (1, 1, TOKENS_AT, 0, 0, 0.0, 0, 0),
        (9, 1, TOKENS_AT, 0, 0, 0.0, 0, 0),
        (-1, 1, TOKENS_AT, 0, 0, 0.0, 0, 0),
    ]
    blob = {
        ITEMS_AT: b"".join(struct.pack(abi.ITEM.format, *item) for item in items),
        TOKENS_AT: u32(9),
        STRUCT_AT: sampling(),
    }
    answer = call("batch_forward", ITEMS_AT, 4, blob=blob)
    assert answer.result == 1
    answers = [answer.fields(abi.ITEM, ITEMS_AT + at * abi.ITEM.size) for at in range(4)]
    assert [a["token"] for a in answers] == [greedy([5, 6, 9]), -3, -3, -3]
    assert answers[0]["length"] == 3


@pytest.mark.parametrize(
    ("item", "code"),
    [
        ((1, 0, TOKENS_AT, 0), ErrorCode.INVALID_ARGUMENT),
        ((1, 2**32 - 1, TOKENS_AT, 0), ErrorCode.INVALID_ARGUMENT),
        ((1, 1, 2**64 - 1, 0), ErrorCode.BAD_POINTER),
        ((1, 1, MEMORY - 3, 0), ErrorCode.BAD_POINTER),
        ((1, 1, TOKENS_AT, 2**63), ErrorCode.BAD_POINTER),
        ((1, 1, TOKENS_AT, MEMORY - 1), ErrorCode.BAD_POINTER),
        ((1, 1 << 12, TOKENS_AT, 0), ErrorCode.CONTEXT_FULL),
    ],
)
def test_batch_items_are_checked(item: tuple[int, int, int, int], code: ErrorCode) -> None:
    blob = {ITEMS_AT: struct.pack(abi.ITEM.format, *item, 0, 0.0, 0, 0), TOKENS_AT: u32(9)}
    answer = call("batch_forward", ITEMS_AT, 1, blob=blob)
    assert answer.result == 0
    assert answer.fields(abi.ITEM, ITEMS_AT)["token"] == code


def test_functions_of_later_versions_say_so() -> None:
    assert call("speculative_step", 1, STRUCT_AT, OUTPUT_AT, 8).result == ErrorCode.NOT_SUPPORTED


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ((3, 0, 0, 0, 0, 0, 0, 0), ErrorCode.INVALID_ARGUMENT),
        ((2, 0, 0, 0, 1, 0, 0, 0), ErrorCode.INVALID_ARGUMENT),
        ((2, 0, 2**40, 4, 0, 0, 0, 0), ErrorCode.BAD_POINTER),
        ((2, 0, 8, 2**32 - 1, 0, 0, 0, 0), ErrorCode.INVALID_ARGUMENT),
        ((0, 0, 0, 0, 0, MEMORY - 8, 0, 0), ErrorCode.BAD_POINTER),
    ],
)
def test_speculation_is_checked_all_the_same(fields: tuple[int, ...], code: ErrorCode) -> None:
    blob = {STRUCT_AT: struct.pack(abi.SPECULATION.format, *fields)}
    assert call("speculative_step", 1, STRUCT_AT, OUTPUT_AT, 8, blob=blob).result == code


# --- logits ---------------------------------------------------------------------------------------


def test_logits_read() -> None:
    answer = call("logits_read", 1, OUTPUT_AT, VOCAB)
    assert answer.result == VOCAB
    assert answer.memory[OUTPUT_AT : OUTPUT_AT + 4 * VOCAB] == logits_of([5, 6]).tobytes()
    small = call("logits_read", 1, OUTPUT_AT, VOCAB - 1)
    assert small.result == VOCAB
    assert small.untouched


@pytest.mark.parametrize("room", [0, 1, 10, VOCAB, VOCAB + 5])
def test_logits_topk(room: int) -> None:
    answer = call("logits_topk", 1, OUTPUT_AT, room)
    tokens, logprobs = most_likely(logits_of([5, 6]), room)
    assert answer.result == min(room, VOCAB)
    got = [answer.fields(abi.CANDIDATE, OUTPUT_AT + 8 * at) for at in range(answer.result)]
    assert [g["token"] for g in got] == tokens.tolist()
    assert [g["logprob"] for g in got] == pytest.approx(logprobs.tolist(), abs=1e-5)


def test_sample_and_score() -> None:
    answer = call("sample", 1, STRUCT_AT, ANSWER_AT, blob={STRUCT_AT: sampling(flags=1)})
    assert answer.result == greedy([5, 6])
    assert answer.fields(abi.TOKEN, ANSWER_AT)["length"] == 2
    assert answer.end.usage.new_tokens == 1
    scores = call("score", 1, TOKENS_AT, 3, OUTPUT_AT, 3, blob={TOKENS_AT: u32(1, 50, 99)})
    assert scores.result == 3
    expected = log_probabilities(logits_of([5, 6]), np.array([1, 50, 99]))
    assert struct.unpack_from("<3f", scores.memory, OUTPUT_AT) == pytest.approx(expected.tolist(), abs=1e-5)
    assert call("score", 1, TOKENS_AT, 1, OUTPUT_AT, 1, blob={TOKENS_AT: u32(100)}).result == -1


# --- sequences, text, session, store ----------------------------------------------------------------


def test_sequences() -> None:
    assert call("seq_new").result == 2
    assert call("seq_fork", 1).result == 2
    assert call("seq_len", 1).result == 2
    assert call("seq_truncate", 1, 1).result == 1
    assert call("seq_truncate", 1, 3).result == ErrorCode.INVALID_ARGUMENT
    assert call("seq_free", 1).result == 0


def test_saved_sequences() -> None:
    host = Host()
    assert call("seq_open", INPUT_AT, 3, blob={INPUT_AT: b"abc"}, host=host).result == ErrorCode.NOT_FOUND
    assert call("seq_save", 1, INPUT_AT, 3, blob={INPUT_AT: b"abc"}, host=host).result == 2
    assert host.engine.saved == {("a", "abc"): [5, 6]}
    assert call("seq_open", INPUT_AT, 3, blob={INPUT_AT: b"abc"}, host=host).result == 2
    host.turn()
    host.check_empty()


def test_text() -> None:
    text = "héllo".encode()
    answer = call("tokenize", INPUT_AT, len(text), 0, OUTPUT_AT, 10, blob={INPUT_AT: text})
    assert answer.result == 6
    assert answer.u32(OUTPUT_AT, 6) == tuple(text)
    small = call("tokenize", INPUT_AT, len(text), 1, OUTPUT_AT, 6, blob={INPUT_AT: text})
    assert small.result == 7
    assert small.untouched
    back = call("detokenize", 0, TOKENS_AT, 2, 0, OUTPUT_AT, 10, blob={TOKENS_AT: u32(72, 73)})
    assert back.memory[OUTPUT_AT : OUTPUT_AT + back.result] == b"HI"


def test_chat_template() -> None:
    messages = b'[{"role":"user","content":"hi"}]'
    answer = call("chat_template", INPUT_AT, len(messages), 1, OUTPUT_AT, 99, blob={INPUT_AT: messages})
    assert answer.memory[OUTPUT_AT : OUTPUT_AT + answer.result] == b"<user>hi<assistant>"
    for bad in (b"{}", b"[1]", b"[[[", b"[" * 400):
        answer = call("chat_template", INPUT_AT, len(bad), 0, OUTPUT_AT, 99, blob={INPUT_AT: bad})
        assert answer.result == ErrorCode.INVALID_ARGUMENT


def test_a_model_without_a_chat_template() -> None:
    tokenizer = FakeTokenizer()
    tokenizer.has_chat_template = False
    host = Host(tokenizer=tokenizer)
    assert call("chat_template", INPUT_AT, 2, 0, OUTPUT_AT, 9, blob={INPUT_AT: b"[]"}, host=host).result == -4
    assert call("model_info", ANSWER_AT, host=host).fields(abi.MODEL_INFO, ANSWER_AT)["flags"] == 0


def test_model_info() -> None:
    assert call("model_info", ANSWER_AT).fields(abi.MODEL_INFO, ANSWER_AT) == {
        "vocab_size": FACTS.vocab_size,
        "context_length": FACTS.context_length,
        "bos": 1,
        "eos": 2,
        "mask_words": 4,
        "layers": 3,
        "hidden_size": 48,
        "flags": 1,
    }


def test_session() -> None:
    assert call("input_len").result == probe.SHOWN
    assert call("input_read", probe.SHOWN, OUTPUT_AT, 5).result == 0
    assert call("input_read", probe.SHOWN + 1, OUTPUT_AT, 5).result == ErrorCode.INVALID_ARGUMENT
    assert call("input_read", 0, OUTPUT_AT, 5).result == 5
    assert call("recv", OUTPUT_AT, 5, 0).result == ErrorCode.TIMED_OUT
    answer = call("log", 2, INPUT_AT, 3, blob={INPUT_AT: b"a\xffb"})
    assert answer.result == 0
    assert answer.host.logs(answer.run) == [("warning", "a�b")]


def test_store() -> None:
    host = Host()
    key = {INPUT_AT: b"k", INPUT_AT + 8: b"value"}
    assert call("kv_get", INPUT_AT, 1, OUTPUT_AT, 9, blob=key, host=host).result == ErrorCode.NOT_FOUND
    assert call("kv_set", INPUT_AT, 1, INPUT_AT + 8, 5, blob=key, host=host).result == 0
    answer = call("kv_get", INPUT_AT, 1, OUTPUT_AT, 9, blob=key, host=host)
    assert answer.memory[OUTPUT_AT : OUTPUT_AT + answer.result] == b"value"
    small = call("kv_get", INPUT_AT, 1, OUTPUT_AT, 4, blob=key, host=host)
    assert small.result == 5
    assert small.untouched


def test_budgets_time_and_random_numbers() -> None:
    assert call("now").result == 1_700_000_000_000
    assert call("tokens_left").result == 1_000_000 - 2
    fuel = call("fuel_left").result
    assert 19_999_000_000 < fuel < 20_000_000_000
    first, again = call("random").result, call("random").result
    assert first == again >= 0


def test_a_defect_of_the_host_is_an_error_code_with_a_correlation_id(caplog: pytest.LogCaptureFixture) -> None:
    class Broken(FakeTokenizer):
        def encode(self, text: str, special: bool) -> list[int]:
            raise ZeroDivisionError("a defect")

        def decode(self, ids: object, special: bool = False) -> str:
            raise ZeroDivisionError("a defect")

    for name, arguments in (("tokenize", (INPUT_AT, 1, 0, OUTPUT_AT, 9)), ("detokenize", (0, TOKENS_AT, 1, 0, 64, 9))):
        answer = call(name, *arguments, host=Host(tokenizer=Broken()))
        assert answer.result == ErrorCode.INTERNAL
        text = answer.host.logs(answer.run)[0][1]
        correlation = text.rsplit(" ", 1)[1]
        assert any(correlation in record.getMessage() for record in caplog.records)
        assert "defect" not in text


def test_the_engine_gets_what_the_guest_asked() -> None:
    blob = {TOKENS_AT: u32(7), STRUCT_AT: sampling(temperature=0.5, top_k=3, seed=9, flags=4 | 2)}
    op = call("forward", 1, TOKENS_AT, 1, STRUCT_AT, 0, blob=blob).host.engine.forwards[-1]
    assert isinstance(op, Forward)
    assert op.want_logits
    assert op.sampling is not None
    assert (op.sampling.temperature, op.sampling.top_k, op.sampling.top_p) == (0.5, 3, 1.0)
    assert op.sampling.repetition_penalty == 1.0
    assert (op.sampling.key, op.sampling.number) == (stream_key(9, 0), 0)
    assert op.seq >> 40 == 5
