"""The committed guests with adapters, against scripted models: one for each adapter, one without any."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from realm.guests.abi import ErrorCode
from realm.run_messages import RunLimits
from tests.guest_harness import ANSWER, EOS, START, VOCAB, Policy, Ran, answers, run_guest
from tests.unit.test_modules_guests import BEST, CHAT, CONSTRAINED, GENERATE, GRAMMAR, PATHS, last_error, noise, say

AB_TEST = PATHS["ab_test"]
HI = [START, *say("user:Hi"), EOS, ANSWER]

# --- generate, chat, best_of_n, constrained -----------------------------------------------------------


@pytest.mark.parametrize("guest", [GENERATE, CHAT, BEST], ids=lambda path: path.stem)
def test_an_adapter_answers(guest: Path) -> None:
    adapters = {"légal": answers(say("whereas")), "other": answers(say("no"))}
    options = {"prompt": "Hi", "temperature": 0, "table": False}
    ran = run_guest(guest, {**options, "adapter": "légal"}, answers(say("hello")), adapters=adapters)
    assert (ran.code, ran.text, ran.engine.applied) == (0, "whereas", ["légal"])
    for none in ({}, {"adapter": None}, {"adapter": ""}):
        ran = run_guest(guest, {**options, **none}, answers(say("hello")), adapters=adapters)
        assert (ran.code, ran.text, ran.engine.applied) == (0, "hello", [])


def test_chat_keeps_its_adapter_for_all_turns() -> None:
    adapters = {"legal": answers(say("one"), say("two"))}
    options = {"prompt": "Hi", "turns": 2, "adapter": "legal"}
    ran = run_guest(CHAT, options, answers(say("x"), say("y")), messages=[b"b"], adapters=adapters)
    assert (ran.text, ran.engine.applied) == ("one\ntwo", ["legal"])


def test_best_of_n_draws_every_answer_from_it() -> None:
    def letters(tokens: list[int]) -> Any:
        logits = np.full(VOCAB, -30, dtype=np.float32)
        logits[[ord("a"), ord("b")] if tokens[-1] == ANSWER else [EOS]] = 5
        return logits

    options = {"prompt": "Hi", "n": 6, "temperature": 2, "adapter": "legal"}
    ran = run_guest(BEST, options, answers(say("base")), adapters={"legal": letters})
    texts = [line.split("  ")[3] for line in ran.text.split("\n\n")[1].splitlines()[1:]]
    assert set(texts) == {"a", "b"} and len(texts) == 6
    assert ran.engine.applied == ["legal"] and ran.engine.forks == 5


def test_constrained_writes_its_grammar_with_an_adapter() -> None:
    def other(tokens: list[int]) -> Any:
        return -noise(tokens)

    ran = run_guest(CONSTRAINED, {"adapter": "legal", "temperature": 0}, noise, adapters={"legal": other})
    assert (ran.code, ran.engine.applied) == (0, ["legal"])
    assert re.fullmatch(GRAMMAR, ran.text)
    assert ran.text != run_guest(CONSTRAINED, {"temperature": 0}, noise).text


@pytest.mark.parametrize("guest", [GENERATE, CHAT, BEST, CONSTRAINED], ids=lambda path: path.stem)
@pytest.mark.parametrize("name", ["legal", "LEGAL", "x" * 128, "\0", 'a"b\n'])
def test_an_adapter_that_there_is_not_ends_the_run_and_is_named(guest: Path, name: str) -> None:
    ran = run_guest(guest, {"prompt": "Hi", "adapter": name}, answers(say("x")), adapters={"poet": answers([])})
    assert (ran.outcome, ran.code, ran.text) == ("error", ErrorCode.NOT_FOUND, "")
    assert ran.engine.forwards == []
    assert last_error(ran) == f"adapter: {name}: cannot be used"
    assert ran.logs[-2] == ("warning", f"lora_apply: there is no adapter {name!r}")
    # What the client is told without reading the log.
    assert ran.finished.error is not None
    assert f"there is no adapter {name!r}" in ran.finished.error.message


# --- ab_test ----------------------------------------------------------------------------------------


def sure(text: str, by: float) -> Policy:
    """A model that gives this answer; ``by`` is how far each of its tokens is above all others."""

    def policy(tokens: list[int]) -> Any:
        script = [*say(text), EOS]
        logits = np.zeros(VOCAB, dtype=np.float32)
        logits[script[len(tokens) - tokens.index(ANSWER) - 1]] = by
        return logits

    return policy


def logprob(by: float) -> float:
    return by - math.log(math.exp(by) + VOCAB - 1)


def ab(options: dict[str, Any], base: Policy, a: Policy, b: Policy, **more: Any) -> Ran:
    return run_guest(AB_TEST, {"a": "legal", "b": "poet", **options}, base, adapters={"legal": a, "poet": b}, **more)


def test_ab_test_ranks_three_answers() -> None:
    ran = ab({"prompt": "Hi"}, sure("hello", 8), sure("whereas", 7), sure('a "b"\né', 9))
    assert (ran.outcome, ran.code) == ("complete", 0)
    assert len(ran.pieces) == 1
    found = json.loads(ran.text)
    assert found["prompt_tokens"] == len(HI)
    assert [{k: v for k, v in answer.items() if k != "mean_logprob"} for answer in found["answers"]] == [
        {"rank": 1, "name": "b", "adapter": "poet", "tokens": 9, "finish": "stop", "text": 'a "b"\né'},
        {"rank": 2, "name": "base", "adapter": None, "tokens": 6, "finish": "stop", "text": "hello"},
        {"rank": 3, "name": "a", "adapter": "legal", "tokens": 8, "finish": "stop", "text": "whereas"},
    ]
    scores = [answer["mean_logprob"] for answer in found["answers"]]
    assert scores == pytest.approx([logprob(9), logprob(8), logprob(7)], abs=2e-6)


def test_ab_test_computes_all_in_one_batch_a_step() -> None:
    ran = ab({"prompt": "Hi"}, sure("ab", 8), sure("abcd", 7), sure("", 9))
    assert ran.engine.applied == ["legal", "poet"]
    # The prompt three times at once, then one token each; who has ended leaves.
    assert ran.engine.batches == [3, 2, 2, 1, 1]
    assert ran.engine.forwards[:3] == [HI] * 3
    assert all(len(tokens) == 1 for tokens in ran.engine.forwards[3:])
    # Each is freed as it ends.
    assert ran.engine.sequences == {}
    assert [answer["text"] for answer in json.loads(ran.text)["answers"]] == ["", "ab", "abcd"]


@pytest.mark.parametrize("order", [(7.0, 8.0, 9.0), (9.0, 8.0, 7.0), (8.0, 9.0, 7.0), (8.0, 8.0, 8.0), (7.0, 9.0, 9.0)])
def test_ab_test_orders_by_the_mean_and_keeps_equals_in_place(order: tuple[float, float, float]) -> None:
    a, b, base = order
    ran = ab({"prompt": "Hi"}, sure("zz", base), sure("x" * 9, a), sure("y", b))
    names = [answer["name"] for answer in json.loads(ran.text)["answers"]]
    expected = sorted([("a", a), ("b", b), ("base", base)], key=lambda arm: -arm[1])
    assert names == [name for name, _ in expected]


def test_ab_test_takes_messages_and_names_adapters_as_json() -> None:
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "c"}]
    name = 'p"\\é\n'
    ran = run_guest(
        AB_TEST,
        {"messages": messages, "a": name, "b": name},
        sure("x", 8),
        adapters={name: sure("y", 9)},
    )
    answers_ = json.loads(ran.text)["answers"]
    assert [(answer["name"], answer["adapter"]) for answer in answers_] == [("a", name), ("b", name), ("base", None)]
    assert ran.engine.forwards[0] == [START, *say("system:s"), EOS, START, *say("user:c"), EOS, ANSWER]


def test_ab_test_cuts_at_max_tokens_and_at_the_context() -> None:
    models = sure("hello", 8), sure("whereas", 7), sure("x", 9)
    cut = json.loads(ab({"prompt": "Hi", "max_tokens": 2}, *models).text)["answers"]
    assert [(answer["text"], answer["tokens"], answer["finish"]) for answer in cut] == [
        ("x", 2, "stop"),
        ("he", 2, "length"),
        ("wh", 2, "length"),
    ]
    # The prompt has 10 tokens: two more fit, and the token that is drawn after them.
    full = json.loads(ab({"prompt": "Hi"}, *models, context=12).text)["answers"]
    assert [(answer["text"], answer["finish"]) for answer in full] == [
        ("x", "stop"),
        ("hel", "length"),
        ("whe", "length"),
    ]
    long = ab({"prompt": "Hi"}, *models, context=9)
    assert (long.code, long.text) == (ErrorCode.CONTEXT_FULL, "")


def test_ab_test_without_a_chat_template() -> None:
    def policy(tokens: list[int]) -> Any:
        logits = np.zeros(VOCAB, dtype=np.float32)
        logits[ord("b") if tokens[-1] == ord("a") else EOS] = 9
        return logits

    ran = ab({"prompt": "a"}, policy, policy, policy, template=False)
    assert {answer["text"] for answer in json.loads(ran.text)["answers"]} == {"b"}
    refused = ab({"messages": []}, policy, policy, policy, template=False)
    assert refused.code == ErrorCode.NOT_SUPPORTED


def test_ab_test_samples_each_answer_by_itself() -> None:
    def letters(tokens: list[int]) -> Any:
        logits = np.full(VOCAB, -50, dtype=np.float32)
        logits[[ord("a"), ord("b"), ord("c")]] = [1.0, 0.9, 0.8]
        return logits

    def texts(seed: int, **options: Any) -> list[str]:
        ran = ab({"prompt": "Hi", "max_tokens": 40, **options}, letters, letters, letters, seed=seed)
        found = json.loads(ran.text)["answers"]
        return [text for _, text in sorted((answer["name"], answer["text"]) for answer in found)]

    assert texts(1) == ["a" * 40] * 3
    assert texts(1, temperature=1) == texts(1, temperature=1) != texts(2, temperature=1)
    assert len(set(texts(1, temperature=1))) == 3
    assert set("".join(texts(1, temperature=1, top_k=2))) == set("ab")


def test_ab_test_of_long_answers_is_emitted_in_pieces() -> None:
    def endless(tokens: list[int]) -> Any:
        logits = np.zeros(VOCAB, dtype=np.float32)
        logits[ord('"')] = 9
        return logits

    # A quote is two bytes of JSON.
    ran = ab({"prompt": "Hi", "max_tokens": 12_000}, endless, endless, endless, context=20_000)
    assert len(ran.pieces) == 2 and len(ran.pieces[0]) == 65_536
    assert [answer["text"] for answer in json.loads(ran.text)["answers"]] == ['"' * 12_000] * 3


@pytest.mark.parametrize(("missing", "name"), [("a", "legal"), ("b", "poet")])
def test_ab_test_names_the_adapter_that_there_is_not(missing: str, name: str) -> None:
    there = {"legal": sure("x", 8), "poet": sure("y", 8)}
    del there[name]
    ran = run_guest(AB_TEST, {"prompt": "Hi", "a": "legal", "b": "poet"}, sure("z", 8), adapters=there)
    assert (ran.outcome, ran.code, ran.text) == ("error", ErrorCode.NOT_FOUND, "")
    assert last_error(ran) == f"adapter: {name}: cannot be used"
    assert ran.engine.forwards == []


def test_ab_test_says_which_limit_stopped_it() -> None:
    few = RunLimits(sequences=2)
    ran = ab({"prompt": "Hi"}, sure("x", 8), sure("y", 8), sure("z", 8), limits=few)
    assert ran.finished.error is not None
    assert (ran.code, ran.finished.error.details["name"]) == (ErrorCode.LIMIT, "sequences_per_run")
    tokens = ab({"prompt": "Hi"}, sure("x", 8), sure("y", 8), sure("z", 8), limits=RunLimits(tokens=25))
    assert tokens.finished.error is not None
    assert (tokens.code, tokens.text) == (ErrorCode.LIMIT, "")
    assert tokens.finished.error.details["name"] == "tokens_per_run"


GOOD = {"prompt": "x", "a": "legal", "b": "poet"}


@pytest.mark.parametrize(
    ("input", "name"),
    [
        (b"", "input"),
        (b"Hi", "input"),
        (b"[]", "input"),
        (b"[" * 100_000, "input"),
        (b'{"prompt": "\xff"}', "input"),
        ({"prompt": "x"}, "a"),
        ({"prompt": "x", "a": "legal"}, "b"),
        ({**GOOD, "a": ""}, "a"),
        ({**GOOD, "b": None}, "b"),
        ({**GOOD, "a": 5}, "a"),
        ({**GOOD, "b": ["poet"]}, "b"),
        ({**GOOD, "a": "n" * 129}, "a"),
        ({**GOOD, "b": "é" * 65}, "b"),
        ({**GOOD, "adapter": "legal"}, "adapter"),
        ({**GOOD, "stop": ["x"]}, "stop"),
        ({**GOOD, "max_tokens": 0}, "max_tokens"),
        ({**GOOD, "max_tokens": 65_537}, "max_tokens"),
        ({**GOOD, "temperature": -1}, "temperature"),
        ({**GOOD, "messages": []}, "prompt"),
        ({"a": "legal", "b": "poet"}, "prompt"),
        ({"a": "legal", "b": "poet", "messages": "x"}, "messages"),
        ({**GOOD, "prompt": 5}, "prompt"),
    ],
)
def test_ab_test_names_what_is_wrong(input: Any, name: str) -> None:
    ran = run_guest(AB_TEST, input, sure("z", 8), adapters={"legal": sure("x", 8), "poet": sure("y", 8)})
    assert (ran.code, ran.text) == (ErrorCode.INVALID_ARGUMENT, "")
    assert last_error(ran).startswith(f"{name}: ")
    assert ran.engine.forwards == []
