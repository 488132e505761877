"""The committed guests in the real guest runtime, against scripted models."""

from __future__ import annotations

import json
import math
import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from realm.guests.abi import ErrorCode
from tests.guest_harness import ANSWER, EOS, START, VOCAB, WORD, Ran, answers, run_guest
from tests.unit.test_modules_abi import ROOT, build

PATHS = {guest.name: guest.path for guest in build.GUESTS}
GENERATE, CHAT = PATHS["generate"], PATHS["chat"]
BEST, CONSTRAINED = PATHS["best_of_n"], PATHS["constrained"]
GRAMMAR = (ROOT / "guest_modules/constrained/grammar.txt").read_text().rstrip("\n")
HELLO = [WORD["Hel"], WORD["lo"], WORD[" wor"], WORD["ld"]]


def say(text: str) -> list[int]:
    return list(text.encode())


def last_error(ran: Ran) -> str:
    """The last error line of the run's log: the guest's own, or a refused host call's."""
    assert ran.outcome == "error"
    return [text for level, text in ran.logs if level in ("error", "warning")][-1]


# --- generate -----------------------------------------------------------------------------------


def test_generate_streams_one_piece_a_token() -> None:
    ran = run_guest(GENERATE, {"prompt": "Hi"}, answers(HELLO))
    assert (ran.outcome, ran.code, ran.pieces) == ("complete", 0, ["Hel", "lo", " wor", "ld"])
    assert ran.engine.forwards == [[START, *say("user:Hi"), EOS, ANSWER], *([t] for t in HELLO)]
    assert ran.finished.usage.new_tokens == 5


def test_generate_never_splits_a_character() -> None:
    ran = run_guest(GENERATE, {"prompt": "Hi"}, answers(say("é😀x")))
    assert ran.pieces == ["é", "😀", "x"]
    cut = run_guest(GENERATE, {"prompt": "Hi", "max_tokens": 3}, answers(say("é😀x")))
    assert (cut.code, cut.text) == (1, "é\ufffd")


def test_generate_passes_messages_as_they_are() -> None:
    messages = [{"role": "system", "content": 'a "b" \u00e9'}, {"role": "user", "content": "c"}]
    ran = run_guest(GENERATE, {"messages": messages}, answers(HELLO))
    assert ran.engine.forwards[0] == [START, *say('system:a "b" é'), EOS, START, *say("user:c"), EOS, ANSWER]


def test_generate_without_a_chat_template_completes_the_text() -> None:
    def policy(tokens: list[int]) -> Any:
        logits = np.zeros(VOCAB, dtype=np.float32)
        logits[ord("b") if tokens[-1] == ord("a") else EOS] = 9
        return logits

    ran = run_guest(GENERATE, {"prompt": "<end>a"}, policy, template=False)
    assert (ran.code, ran.text, ran.engine.forwards[0]) == (0, "b", say("<end>a"))
    refused = run_guest(GENERATE, {"messages": []}, policy, template=False)
    assert refused.code == ErrorCode.NOT_SUPPORTED and "chat template" in last_error(refused)
    assert "empty" in last_error(run_guest(GENERATE, {"prompt": ""}, policy, template=False))


@pytest.mark.parametrize(
    ("stop", "text", "code"),
    [
        (["wor"], "Hello ", 0),
        (["lo wo"], "Hel", 0),
        (["world", "ello"], "H", 0),
        ("ld", "Hello wor", 0),
        (["world!"], "Hello world", 0),
        (["Hello wor!", "lo"], "Hel", 0),
        (["ldx", "world?"], "Hello world", 0),
        (["Hello"], "", 0),
        ([], "Hello world", 0),
    ],
)
def test_generate_stop_strings(stop: Any, text: str, code: int) -> None:
    ran = run_guest(GENERATE, {"prompt": "Hi", "stop": stop}, answers(HELLO))
    assert (ran.code, ran.text) == (code, text)


@settings(max_examples=150, deadline=None)
@given(st.text("abé", max_size=12), st.lists(st.text("abé", min_size=1, max_size=4), max_size=8))
def test_generate_stops_where_a_search_in_the_whole_text_would(text: str, stops: list[str]) -> None:
    ran = run_guest(GENERATE, {"prompt": "Hi", "stop": stops}, answers(say(text)))
    expected = text
    for end in range(len(text) + 1):
        found = [text[:end].find(stop) for stop in stops if stop in text[:end]]
        if found:
            expected = text[: min(found)]
            break
    assert (ran.code, ran.text) == (0, expected)


def test_generate_ends_at_max_tokens_and_at_the_context() -> None:
    ran = run_guest(GENERATE, {"prompt": "Hi", "max_tokens": 2}, answers(HELLO))
    assert (ran.code, ran.text, len(ran.engine.forwards)) == (1, "Hello", 2)
    # The prompt has 10 tokens: one more fits, and the token drawn after it.
    full = run_guest(GENERATE, {"prompt": "Hi", "max_tokens": 50}, answers(HELLO), context=11)
    assert (full.code, full.text) == (1, "Hello")
    exact = run_guest(GENERATE, {"prompt": "Hi"}, answers(HELLO), context=10)
    assert (exact.code, exact.text) == (1, "Hel")
    long = run_guest(GENERATE, {"prompt": "Hi"}, answers(HELLO), context=9)
    assert (long.outcome, long.code) == ("error", ErrorCode.CONTEXT_FULL)


def test_generate_samples_as_told() -> None:
    def policy(tokens: list[int]) -> Any:
        logits = np.full(VOCAB, -50, dtype=np.float32)
        logits[[ord("a"), ord("b"), ord("c")]] = [2.0, 1.9, 1.8]
        return logits

    def text(**options: Any) -> str:
        seed = options.pop("seed", 1)
        return run_guest(GENERATE, {"prompt": "Hi", "max_tokens": 40, **options}, policy, seed=seed).text

    assert text() == "a" * 40
    assert set(text(temperature=1)) == set("abc")
    assert text(temperature=1) == text(temperature=1)
    assert text(temperature=1) != text(temperature=1, seed=2)
    assert set(text(temperature=1, top_k=2)) == set("ab")
    assert set(text(temperature=1, top_p=0.2)) == {"a"}
    assert set(text(temperature=1, min_p=0.85)) == set("ab")
    assert set(text(repetition_penalty=2)) == set("abc")


@pytest.mark.parametrize(
    ("input", "name"),
    [
        (b"", "input"),
        (b"Hi", "input"),
        (b'{"prompt": "Hi"', "input"),
        (b'{"prompt": "\\ud800"}', "input"),
        (b'{"prompt": "\xff"}', "input"),
        (b"[" * 100_000, "input"),
        ({}, "prompt"),
        ({"prompt": 5}, "prompt"),
        ({"prompt": "a", "messages": []}, "prompt"),
        ({"messages": {"role": "user"}}, "messages"),
        ({"messages": [5]}, "messages"),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens"),
        ({"prompt": "a", "max_tokens": -1}, "max_tokens"),
        ({"prompt": "a", "max_tokens": 1.5}, "max_tokens"),
        ({"prompt": "a", "max_tokens": 1 << 64}, "max_tokens"),
        ({"prompt": "a", "max_tokens": "5"}, "max_tokens"),
        ({"prompt": "a", "temperature": -0.1}, "temperature"),
        ({"prompt": "a", "temperature": 101}, "temperature"),
        (b'{"prompt": "a", "temperature": 1e999}', "temperature"),
        ({"prompt": "a", "top_p": 1.1}, "top_p"),
        ({"prompt": "a", "min_p": True}, "min_p"),
        ({"prompt": "a", "top_k": -1}, "top_k"),
        ({"prompt": "a", "repetition_penalty": 0}, "repetition_penalty"),
        ({"prompt": "a", "stop": 5}, "stop"),
        ({"prompt": "a", "stop": [5]}, "stop"),
        ({"prompt": "a", "stop": [""]}, "stop"),
        ({"prompt": "a", "stop": ["x"] * 9}, "stop"),
        ({"prompt": "a", "adapter": 5}, "adapter"),
        ({"prompt": "a", "adapter": ["legal"]}, "adapter"),
        ({"prompt": "a", "adapter": "n" * 129}, "adapter"),
        ({"prompt": "a", "adapter": "é" * 65}, "adapter"),
    ],
)
def test_generate_names_what_is_wrong(input: Any, name: str) -> None:
    ran = run_guest(GENERATE, input, answers(HELLO))
    assert ran.code == ErrorCode.INVALID_ARGUMENT
    assert name in last_error(ran)
    assert ran.engine.forwards == []


# --- chat ---------------------------------------------------------------------------------------


def test_chat_takes_plain_text() -> None:
    ran = run_guest(CHAT, b' Say "hi"\n', answers(HELLO))
    assert (ran.code, ran.text) == (0, "Hello world")
    assert ran.engine.forwards[0] == [START, *say('user: Say "hi"\n'), EOS, ANSWER]


def test_chat_forwards_only_what_is_new() -> None:
    ran = run_guest(
        CHAT, {"prompt": "a", "system": "s", "turns": 3}, answers(say("xy"), say("z"), []), messages=[b"b", b"c"]
    )
    assert (ran.code, ran.text) == (0, "xy\nz\n")
    assert [f for f in ran.engine.forwards if len(f) > 1] == [
        [START, *say("system:s"), EOS, START, *say("user:a"), EOS, ANSWER],
        [EOS, START, *say("user:b"), EOS, ANSWER],
        [EOS, START, *say("user:c"), EOS, ANSWER],
    ]
    assert ran.engine.truncations == 0


def test_chat_drops_tokens_that_are_read_differently() -> None:
    """The answer's words are bytes when the conversation is tokenized again, as a template may demand."""
    ran = run_guest(CHAT, {"prompt": "a", "turns": 2}, answers(HELLO, say("ok")), messages=[b"b"])
    assert ran.text == "Hello world\nok"
    assert ran.engine.truncations == 1
    assert ran.engine.forwards[5] == [*say("Hello world"), EOS, START, *say("user:b"), EOS, ANSWER]


def test_chat_after_a_stop_string_keeps_only_what_was_said() -> None:
    ran = run_guest(CHAT, {"prompt": "a", "turns": 2, "stop": ["#"]}, answers(say("x##y"), say("ok")), messages=[b"b"])
    assert ran.text == "x\nok"
    assert ran.engine.forwards[2] == [EOS, START, *say("user:b"), EOS, ANSWER]


def test_chat_long_messages_and_time_out() -> None:
    long = ("é" * 9000).encode()
    options = {"prompt": "a", "turns": 3, "timeout_ms": 50}
    ran = run_guest(CHAT, options, answers(say("x"), say("y")), messages=[long], context=1 << 16)
    assert (ran.outcome, ran.code, ran.text) == ("complete", 2, "x\ny\n")
    assert ran.engine.forwards[2] == [EOS, START, *say("user:"), *long, EOS, ANSWER]


def test_chat_continues_a_conversation() -> None:
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    ran = run_guest(CHAT, {"messages": messages, "turns": 2}, answers([], say("d"), say("e")), messages=[b"f"])
    assert ran.text == "d\ne"
    assert ran.engine.forwards[0][-3:] == [ord("c"), EOS, ANSWER]


@pytest.mark.parametrize(
    ("input", "name"),
    [
        (b"", "input"),
        (b" {oops", "input"),
        ({}, "prompt"),
        ({"prompt": "a", "messages": [{"role": "user", "content": "b"}]}, "prompt"),
        ({"messages": []}, "messages"),
        ({"messages": 1}, "messages"),
        ({"messages": [{"role": "user", "content": "b"}], "system": "s"}, "system"),
        ({"prompt": "a", "system": 1}, "system"),
        ({"prompt": "a", "turns": 0}, "turns"),
        ({"prompt": "a", "timeout_ms": -1}, "timeout_ms"),
        ({"prompt": "a", "temperature": None, "top_k": "all"}, "top_k"),
        ({"prompt": "a", "adapter": {}}, "adapter"),
    ],
)
def test_chat_names_what_is_wrong(input: Any, name: str) -> None:
    ran = run_guest(CHAT, input, answers(HELLO))
    assert ran.code == ErrorCode.INVALID_ARGUMENT
    assert name in last_error(ran)


def test_chat_needs_a_template() -> None:
    assert run_guest(CHAT, b"hi", answers(HELLO), template=False).code == ErrorCode.NOT_SUPPORTED


# --- best_of_n ----------------------------------------------------------------------------------


def letters(tokens: list[int]) -> Any:
    """a is more likely than b, b than c; each answer ends after 1 to 3 letters, by its first."""
    said = tokens[tokens.index(ANSWER) + 1 :]
    logits = np.full(VOCAB, -30, dtype=np.float32)
    if said and len(said) >= 1 + said[0] - ord("a"):
        logits[EOS] = 5
    else:
        logits[[ord("a"), ord("b"), ord("c")]] = [1.0, 0.5, 0.0]
    return logits


def test_best_of_n_prefills_once_and_ranks() -> None:
    ran = run_guest(BEST, {"prompt": "Hi", "n": 8, "temperature": 2}, letters)
    assert (ran.outcome, ran.code) == ("complete", 0)
    best, table = ran.text.split("\n\n")
    lines = table.splitlines()
    assert lines[0] == "rank  mean log-probability  tokens  text"
    rows = [line.split("  ") for line in lines[1:]]
    assert [row[0] for row in rows] == [str(i + 1) for i in range(8)]
    scores = [float(row[1]) for row in rows]
    assert scores == sorted(scores, reverse=True)
    assert rows[0][3] == best
    normalizer = math.log(sum(math.exp(x) for x in (1.0, 0.5, 0.0)))
    for row in rows:
        text = row[3]
        assert int(row[2]) == len(text) == 1 + ord(text[0]) - ord("a")
        total = sum({"a": 1.0, "b": 0.5, "c": 0.0}[letter] - normalizer for letter in text)
        assert float(row[1]) == pytest.approx(total / (len(text) + 1), abs=1e-3)
    assert len({row[3] for row in rows}) > 1
    assert ran.engine.forks == 7
    assert sum(len(f) > 1 for f in ran.engine.forwards) == 1
    # Prefill alone; then all together, and fewer as answers end.
    assert ran.engine.batches[:2] == [1, 8]
    assert ran.engine.batches[1:] == sorted(ran.engine.batches[1:], reverse=True)
    assert ran.engine.batches[-1] < 8


def test_best_of_n_ends_at_max_tokens_and_the_context() -> None:
    options = {"prompt": "Hi", "n": 3, "table": False}
    ran = run_guest(BEST, {**options, "max_tokens": 2}, answers(HELLO))
    assert ran.text == "Hello"
    full = run_guest(BEST, options, answers(HELLO), context=12)
    assert full.text == "Hello wor"
    long = run_guest(BEST, options, answers(HELLO), context=9)
    assert long.code == ErrorCode.CONTEXT_FULL


def test_best_of_n_table_keeps_characters_whole() -> None:
    ran = run_guest(BEST, {"prompt": "Hi", "n": 1, "max_tokens": 200}, answers(say("x\n" + "é" * 60)))
    best, table = ran.text.split("\n\n")
    assert best == "x\n" + "é" * 60
    assert table.splitlines()[1].endswith("x " + "é" * 29)


def test_best_of_n_of_empty_answers() -> None:
    ran = run_guest(BEST, b"plain text", answers([]))
    assert ran.code == 0 and ran.text.startswith("\n\nrank") and len(ran.text.splitlines()) == 7


@pytest.mark.parametrize(
    ("input", "name"),
    [
        (b"", "prompt"),
        ({"prompt": ""}, "prompt"),
        ({}, "prompt"),
        (b"{", "input"),
        ({"prompt": "a", "n": 0}, "n"),
        ({"prompt": "a", "n": 33}, "n"),
        ({"prompt": "a", "table": 1}, "table"),
        ({"prompt": "a", "stop": ["x"]}, "stop"),
        ({"prompt": "a", "max_tokens": None, "min_p": 2}, "min_p"),
        ({"prompt": "a", "adapter": 1}, "adapter"),
    ],
)
def test_best_of_n_names_what_is_wrong(input: Any, name: str) -> None:
    ran = run_guest(BEST, input, answers(HELLO))
    assert ran.code == ErrorCode.INVALID_ARGUMENT
    assert name in last_error(ran)


# --- constrained --------------------------------------------------------------------------------


def noise(tokens: list[int]) -> Any:
    """Logits without sense, different in every place; the forbidden tokens are the likely ones."""
    logits = np.random.default_rng(len(tokens) * 1000 + tokens[-1]).normal(size=VOCAB).astype(np.float32) * 5
    logits[[EOS, 0, 200, WORD["été"]]] += 50
    return logits


@pytest.mark.parametrize("sampler", ["guest", "engine", "both"])
@pytest.mark.parametrize("temperature", [0, 0.8, 1.5, 100])
def test_constrained_always_matches(sampler: str, temperature: float) -> None:
    texts = set()
    for seed in range(5):
        ran = run_guest(CONSTRAINED, {"sampler": sampler, "temperature": temperature}, noise, seed=seed)
        assert (ran.outcome, ran.code) == ("complete", 0)
        assert re.fullmatch(GRAMMAR, ran.text), ran.text
        assert set(json.loads(ran.text)) == {"name", "age", "city", "likes"}
        texts.add(ran.text)
    assert len(texts) == (1 if temperature == 0 else 5)


def test_constrained_shows_both_samplers_and_forced_text() -> None:
    ran = run_guest(CONSTRAINED, b"", noise)
    counts = re.fullmatch(
        r"draws by the guest (\d+), by the engine (\d+); characters without a draw (\d+)", ran.logs[-1][1]
    )
    assert counts is not None
    guest, engine, forced = map(int, counts.groups())
    assert abs(guest - engine) <= 1 and guest > 3 and forced >= len('{"name": "", "age": , "city": "')
    assert len(ran.engine.forwards) == guest + engine
    # The forced beginning goes to the model together with the prompt.
    assert bytes(ran.engine.forwards[0][-10:]) == b'{"name": "'


def test_constrained_draws_both_ways_from_the_same_distribution() -> None:
    def policy(tokens: list[int]) -> Any:
        logits = np.full(VOCAB, 20, dtype=np.float32)
        logits[[ord("a"), ord("b")]] = [1.0, 0.0]
        return logits

    share = 1 / (1 + math.exp(-1 / 2))
    for sampler in ("guest", "engine"):
        options = {"grammar": "[ab]{400}", "temperature": 2, "sampler": sampler, "prompt": "Hi"}
        text = run_guest(CONSTRAINED, options, policy).text
        assert len(text) == 400
        assert abs(text.count("a") / 400 - share) < 4 * math.sqrt(share * (1 - share) / 400)


PARTS = st.recursive(
    st.sampled_from(["a", "b", "[a-c]", "[ab-]", r"\.", '"', " ", "[A-Z0-9_]", r"\{", r"[\]\\]"]),
    lambda inner: (
        st.lists(inner, min_size=1, max_size=3).map("".join).map(lambda s: f"({s})")
        | st.lists(inner, min_size=1, max_size=3).map("|".join).map(lambda s: f"({s})")
        | st.tuples(inner.map(lambda s: f"({s})"), st.sampled_from(["?", "{2}", "{1,3}", "{0,2}", "{0,1}"])).map(
            "".join
        )
    ),
    max_leaves=8,
)


@settings(max_examples=120, deadline=None)
@given(st.lists(PARTS, max_size=3).map("".join), st.integers(0, 3), st.sampled_from([0, 1.0, 5.0]))
def test_constrained_matches_any_pattern(pattern: str, seed: int, temperature: float) -> None:
    ran = run_guest(CONSTRAINED, {"grammar": pattern, "temperature": temperature}, noise, seed=seed)
    assert ran.code == 0, ran.logs
    assert re.fullmatch(pattern, ran.text), (pattern, ran.text)


BAD_PATTERNS = r"(a a) [ [] [^a] [b-a] a* a+ a{0} a{3,2} a{2 a{,2} a{9999} a?? a{2}{2} ? {1} . ^a a$ \d \ é (?:a) ]"


@pytest.mark.parametrize("grammar", [*BAD_PATTERNS.split(), "a\n", "a" * 600, "(" * 50])
def test_constrained_says_where_a_pattern_is_wrong(grammar: str) -> None:
    ran = run_guest(CONSTRAINED, {"grammar": grammar}, noise)
    assert (ran.code, ran.text) == (ErrorCode.INVALID_ARGUMENT, "")
    assert re.match(r"grammar: at character \d+: ", last_error(ran))


@pytest.mark.parametrize(
    ("input", "name"),
    [
        (b"{", "input"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": "hot"}, "input"),
        ({"sampler": "magic"}, "input"),
        ({"prompt": 1}, "input"),
        ({"adapter": 1}, "input"),
    ],
)
def test_constrained_names_what_is_wrong(input: Any, name: str) -> None:
    ran = run_guest(CONSTRAINED, input, noise)
    assert ran.code == ErrorCode.INVALID_ARGUMENT
    assert name in last_error(ran)
    assert ran.text == ""


def test_constrained_stops_at_the_context() -> None:
    ran = run_guest(CONSTRAINED, {"prompt": "Hi"}, noise, context=40)
    assert (ran.outcome, ran.code) == ("error", ErrorCode.CONTEXT_FULL)
