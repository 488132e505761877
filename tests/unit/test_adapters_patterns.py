"""Which key of a rank or alpha pattern a module has: as PEFT decides it, and in linear time."""

from __future__ import annotations

import re
import string

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from realm.adapters.patterns import MAX_DEPTH, MAX_KEYS, MAX_LENGTH, PatternError, Patterns
from realm.adapters.tensors import TARGETS, module_name

MODULES = [module_name(layer, target) for layer in (0, 1, 2, 10, 11, 21, 110) for target in TARGETS]


def by_re(keys: list[str], module: str) -> int | None:
    """The number of the key that PEFT's rule chooses."""
    return next((n for n, key in enumerate(keys) if re.match(rf"(.*\.)?({key})$", module)), None)


def chosen(keys: list[str], module: str) -> int | None:
    return Patterns[int | None](dict(zip(keys, range(len(keys)), strict=True))).get(module, None)


def test_the_rule_is_that_of_peft() -> None:
    from peft.utils.other import get_pattern_key

    keys = ["q_proj", ".*", "layers.1.mlp.up_proj", "^layers.0.mlp.up_proj"]
    for module in MODULES:
        for some in (keys, keys[::-1], keys[2:], []):
            number = by_re(some, module)
            assert get_pattern_key(some, module) == (module if number is None else some[number])


@pytest.mark.parametrize(
    "keys",
    [
        ["q_proj"],
        ["proj"],
        [".proj"],
        ["q.proj"],
        ["_proj"],
        ["self_attn.q_proj", "q_proj"],
        ["q_proj", "self_attn.q_proj"],
        ["1.self_attn.q_proj", "11.self_attn.q_proj"],
        ["layers.1.self_attn.q_proj"],
        ["layers.1..self_attn.q_proj"],
        ["layers...self_attn.q_proj"],
        ["model.layers.1.self_attn.q_proj"],
        ["^model.layers.1.self_attn.q_proj"],
        ["^layers.1.self_attn.q_proj"],
        ["^q_proj|mlp.down_proj"],
        ["mlp.down_proj|^model.layers.0.self_attn.q_proj$"],
        [r".*\.[qk]_proj$"],
        [r"layers\.(0|1)\..*"],
        [r"layers\.\d\..*", r"layers\.\d+\.mlp.*"],
        [r".*(self_attn|mlp)\.(q|up|down)_proj"],
        [r"layers.[0-1]?[0-9].*_proj", ".*"],
        [r"(?:model\.)?layers\.1+\.\w+\.[^qk]_proj"],
        ["", "q_proj"],
        ["(|q)_proj"],
        ["((q|k)_)+proj"],
        [r"[\w.]*?o_proj"],
        ["[]a-q-]_proj", "[^]]_proj"],
        ["nothing", "of.this", "matches"],
    ],
)
def test_keys_as_people_write_them(keys: list[str]) -> None:
    found = [chosen(keys, module) for module in MODULES]
    assert found == [by_re(keys, module) for module in MODULES]


def bounded(text: str) -> bool:
    """Does ``re`` come to an end soon? Its time grows with the name's length to the power of the repetitions."""
    return len(text) < 80 and text.count("*") + text.count("+") <= 3


def expressions() -> st.SearchStrategy[str]:
    """Expressions of all that is supported, likely to match parts of modules' names, and such as ``re`` ends with.

    Repetitions within repetitions would keep it busy for ever, and so would those of branches that can take the same
    text in many ways, such as ``(.|\\w)*``: of the branches that are repeated one at most begins with a class.
    """
    texts = ["q", "k", "proj", "_proj", "q_proj", "mlp", "self_attn", "layers", "model", "1", "0", "up", "down", "a"]
    classes = [".", r"\d", r"\w", r"\W", r"\D", "[qk]", "[^q]", "[0-9]", "[a-z_]", r"[\d.]"]
    atoms = st.sampled_from([*texts, r"\.", *classes])
    flat = st.lists(atoms, min_size=1, max_size=3).map("".join)
    plain = st.lists(st.sampled_from([*texts, r"\."]), max_size=2).map("".join)
    branches = st.lists(plain, max_size=2).flatmap(lambda some: st.permutations([*some, ""])).map("|".join)
    mixed = st.tuples(plain, st.sampled_from(classes), plain).map(lambda parts: f"{parts[1]}{parts[0]}|{parts[2]}")
    alike = branches | mixed
    signs = st.sampled_from(["*", "+", "?", "*?", "+?", "??"])
    repeated = st.tuples(atoms | alike.map("({})".format) | alike.map("(?:{})".format), signs).map("".join)
    common = st.sampled_from([".*", ".+", r"\d+", r"[a-z_]*", "q?"])
    sequence = st.lists(flat | flat | common | repeated, min_size=1, max_size=3).map("".join)
    grouped = st.lists(sequence, min_size=1, max_size=3).map("|".join).map("({})".format)
    part = st.lists(sequence | grouped, min_size=1, max_size=2).map("".join)
    whole = st.tuples(st.sampled_from(["", "^"]), part, st.sampled_from(["", "$"])).map("".join)
    return st.lists(whole, min_size=1, max_size=2).map("|".join)


@settings(max_examples=300, deadline=None)
@given(st.lists(expressions().filter(bounded), min_size=1, max_size=4, unique=True))
@example(["^a|q_proj$", "(?:q|)*_proj"])
@example(["(q|k|)+_proj", r"(?:\d|layers\.)*.+(_|proj|)*$"])
def test_any_expression_matches_as_re_does(keys: list[str]) -> None:
    for module in MODULES[:14]:
        assert chosen(keys, module) == by_re(keys, module)


@settings(max_examples=400, deadline=None)
@given(st.lists(st.text(string.printable, max_size=20), max_size=4, unique=True))
@example(["[z-a]"])
@example(["(?i)q"])
@example(["\\"])
@example(["["])
@example(["[a-\\d]"])
@example(["(" * 500])
def test_any_text_is_an_expression_or_refused(keys: list[str]) -> None:
    try:
        patterns = Patterns(dict.fromkeys(keys, 1))
    except PatternError:
        return
    for key in keys:
        re.compile(rf"(.*\.)?({key})$")
    if any(re.search(r"\)[*+]", key) or not bounded(key) for key in keys):
        return  # re might not end
    for module in MODULES[:7]:
        assert patterns.get(module, 0) == (by_re(keys, module) is not None)


@pytest.mark.parametrize(
    ("key", "problem"),
    [
        ("(q", "( without"),
        ("q)", ") without"),
        ("[q", "[ without"),
        ("*q", "repeats nothing"),
        ("q|*", "repeats nothing"),
        ("q**", "repeats a repetition"),
        ("q*+", "repeats a repetition"),
        ("q{2}", "{"),
        ("a(^q)", "^"),
        ("q$_proj", "$"),
        (r"(q)\1", r"\1"),
        (r"\bq", r"\b"),
        ("q\\", "\\"),
        ("(?P<a>q)", "(?:"),
        ("(?=q)q", "(?:"),
        ("(?i)q", "(?:"),
        ("[z-a]", "range"),
        (r"[\d-z]", "range"),
        ("qü", "characters"),
        ("q\n", "characters"),
        ("\ud800", "characters"),
        ("(" * (MAX_DEPTH + 1) + "q" + ")" * (MAX_DEPTH + 1), "groups"),
    ],
)
def test_what_is_not_supported_is_refused_with_the_key(key: str, problem: str) -> None:
    with pytest.raises(PatternError) as caught:
        Patterns({"q_proj": 1, key: 2})
    text = str(caught.value)
    assert problem in text
    assert text.isascii() and text.isprintable()
    assert text.startswith(f"{key[:100]!a} ")


def test_expressions_are_bounded_and_full_names_are_not() -> None:
    Patterns({"a" * MAX_LENGTH: 1})
    for keys in (["a" * (MAX_LENGTH + 1)], ["a" * MAX_LENGTH, "b"]):
        with pytest.raises(PatternError, match="characters of expressions"):
            Patterns(dict.fromkeys(keys, 1))
    names = [module_name(layer, target) for layer in range(126) for target in TARGETS]
    patterns = Patterns({name: number for number, name in enumerate(names)})
    assert [patterns.get(name, -1) for name in names] == list(range(len(names)))
    assert patterns.get(module_name(126, "q_proj"), -1) == -1
    with pytest.raises(PatternError, match=str(MAX_KEYS)):
        Patterns({f"{number}.self_attn.q_proj": 1 for number in range(MAX_KEYS + 1)})


@pytest.mark.parametrize(
    "key", ["(a|a)*b", "(.*)*b", "(.*.*)*" * 10 + "!", "(((q|.)*)*)*!", ".*" * 100 + "!", "(.?)*" * 60 + "!"]
)
def test_nothing_backtracks(key: str) -> None:
    patterns = Patterns({key: 1})
    for module in MODULES:
        assert patterns.get(module, 0) == 0
    ((_, automaton),) = patterns._others
    # Each step was taken at most once for each place in the names.
    assert len(automaton._steps) <= sum(map(len, MODULES))
    assert len(automaton._follow) <= len(key) + 2


def test_a_value_that_is_false_counts() -> None:
    assert Patterns({"q_proj": 0.0, ".*": 1.0}).get("model.layers.0.self_attn.q_proj", 2.0) == 0.0
