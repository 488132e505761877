"""Chat templates: what they may do, and what neither they nor messages can."""

from __future__ import annotations

import datetime
import re
from typing import Any

import pytest

from realm.errors import RealmError
from realm.models import chat
from realm.models.chat import ChatTemplate

USER: list[dict[str, Any]] = [{"role": "user", "content": "<b>hi</b>"}]


def render(source: str, messages: list[dict[str, Any]] | None = None, generate: bool = False) -> str:
    return ChatTemplate(source, {"bos_token": "<s>"}).render(USER if messages is None else messages, generate)


def test_templates_get_the_names_and_whitespace_rules_they_are_written_for() -> None:
    source = """
    {%- for m in messages %}
        {%- if m.role == 'skip' %}{% continue %}{% endif %}
        {{- bos_token + m.content }}
    {%- endfor %}
    {%- if add_generation_prompt and tools is none and documents is none %}{{ '|' }}{% endif %}
    {%- generation %}{{ messages | tojson }}{% endgeneration %}"""
    messages = [{"role": "skip"}, {"role": "user", "content": "é<"}]
    expected = '<s>é<|[{"role": "skip"}, {"role": "user", "content": "é<"}]'
    assert render(source, messages, generate=True) == expected


def test_the_date_is_todays() -> None:
    before = datetime.datetime.now().strftime("%Y")
    assert render("{{ strftime_now('%Y') }}") in {before, datetime.datetime.now().strftime("%Y")}


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
        "{{ raise_exception.__globals__.x }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update({'role': 'x'}) }}",
        "{{ raise_exception('roles must alternate') }}",
        "{{ messages[0]['missing'] + 'x' }}",
        "{{ messages[7].content.x }}",
        "{{ 'a' * 10000000000 }}",
        "{{ 10000000000 * [1] }}",
        "{{ 9 ** 9 ** 9 ** 9 ** 9 }}",
        "{{ 1 // 0 }}",
        "{{ range(10000000000) }}",
        "{{ messages | tojson(indent=1000000000) }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    ],
)
def test_a_template_stays_in_its_sandbox(source: str) -> None:
    with pytest.raises(RealmError) as caught:
        render(source)
    assert (caught.value.code, caught.value.details) == ("invalid_params", {"param": "messages"})
    assert USER == [{"role": "user", "content": "<b>hi</b>"}]


def test_output_and_time_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    flood = "{% for i in range(99999) %}{% for j in range(99999) %}{{ 'a' * 1000 }}{% endfor %}{% endfor %}"
    with pytest.raises(RealmError, match=re.escape("more than 16777216 characters")):
        render(flood)
    monkeypatch.setattr(chat, "MAX_SECONDS", 0.05)
    with pytest.raises(RealmError, match=r"took more than 0\.05 s"):
        render(flood.replace("'a' * 1000", "''"))


@pytest.mark.parametrize(
    "messages",
    [
        [],
        "text",
        {"role": "user"},
        ["text"],
        [{"content": "x"}],
        [{"role": 5, "content": "x"}],
        [{"role": "user", "content": object()}],
        [{"role": "user", "content": "x" * (5 << 20)}],
        [{"role": "user", "content": "x"}] * 5000,
        [{"role": "user", "content": "\ud800"}],
    ],
)
def test_messages_are_checked(messages: Any) -> None:
    with pytest.raises(RealmError) as caught:
        render("{{ messages }}", messages)
    assert (caught.value.code, caught.value.details["param"]) == ("invalid_params", "messages")


def test_deep_messages_are_refused() -> None:
    deep: Any = "x"
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(RealmError, match="nested more than"):
        render("{{ messages }}", [{"role": "user", "content": deep}])
    while isinstance(deep, list):  # take it apart: freeing it in one go would recurse
        deep = deep.pop()


@pytest.mark.parametrize("source", ["{% for %}", "{{", "x" * (300 << 10), "{{" + "(" * 5000 + "1" + ")" * 5000 + "}}"])
def test_templates_that_do_not_compile_are_named(source: str) -> None:
    with pytest.raises(RealmError) as caught:
        ChatTemplate(source, {})
    assert (caught.value.code, caught.value.details) == ("model_invalid", {"field": "chat_template"})
