"""Chat templates: a model's Jinja template, rendered in a sandbox.

The template comes with the model's files and the messages come from tenants: neither may reach
Python objects, change its input, or blow up memory. The environment is the one that templates
are written for (the names and whitespace rules of Hugging Face's ``apply_chat_template``).
"""

from __future__ import annotations

import datetime
import json
import time
from collections.abc import Callable
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import msgspec
from jinja2 import nodes
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from realm.errors import RealmError

MAX_TEMPLATE = 256 << 10
"""Longest template in characters."""
MAX_MESSAGES = 4096
MAX_INPUT = 4 << 20
"""Most bytes of all messages together, as JSON."""
MAX_OUTPUT = 16 << 20
"""Most characters of rendered text."""
MAX_SECONDS = 2.0
"""Rendering is given up after this time, at the next piece of output."""

_MAX_REPEAT = 1 << 20
_MAX_BITS = 4096
_MAX_DEPTH = 64

# What rendering can raise when a message does not have what the template uses.
_RENDER_ERRORS = (
    jinja2.TemplateError,
    TypeError,
    ValueError,
    LookupError,
    AttributeError,
    ArithmeticError,
    RecursionError,
    MemoryError,
)


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox, with products bounded: ``'a' * 10**12`` must not allocate."""

    intercepted_binops = frozenset({"*", "**"})

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        numbers = isinstance(left, int | float) and isinstance(right, int | float)
        if operator == "**":
            bits = left.bit_length() if isinstance(left, int) else 64
            if not numbers or bits * abs(right) > _MAX_BITS:
                raise jinja2.TemplateRuntimeError("the power is too large")
        elif not numbers:
            size = len(left) if hasattr(left, "__len__") else len(right) if hasattr(right, "__len__") else 0
            times = left if isinstance(left, int) else right if isinstance(right, int) else 0
            if size * times > _MAX_REPEAT:
                raise jinja2.TemplateRuntimeError("the repeated text is too long")
        elif isinstance(left, int) and isinstance(right, int) and left.bit_length() + right.bit_length() > _MAX_BITS:
            raise jinja2.TemplateRuntimeError("the product is too large")
        return super().call_binop(context, operator, left, right)


class _Generation(jinja2.ext.Extension):
    """``{% generation %}`` marks the assistant's text for training; here it only passes it on."""

    tags: set[str] = {"generation"}  # noqa: RUF012 - declared so by the base class

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(str(message)[:1000])


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    if indent is not None and not 0 <= indent <= 16:
        raise jinja2.TemplateRuntimeError("tojson: indent is out of range")
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _strftime_now(form: str) -> str:
    # Templates print the date of the machine's own calendar, as the reference does.
    return datetime.datetime.now().strftime(form[:100])


class ChatTemplate:
    """One compiled template.

    Args:
        source: the Jinja source.
        special_tokens: names that the template may use (``bos_token``, ``eos_token``, ...).

    Raises:
        RealmError: ``model_invalid`` naming ``chat_template`` if it is too long or does not compile.
    """

    def __init__(self, source: str, special_tokens: dict[str, str]) -> None:
        if len(source) > MAX_TEMPLATE:
            raise _bad_template(f"has {len(source)} characters; the limit is {MAX_TEMPLATE}")
        environment = _Environment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _to_json
        helpers: dict[str, Callable[..., Any]] = {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
        environment.globals.update(helpers)
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise _bad_template(f"does not compile: {error}") from error
        except (RecursionError, MemoryError, ValueError, SyntaxError) as error:
            raise _bad_template("does not compile: it is nested too deeply or is no valid program") from error
        self._special_tokens = dict(special_tokens)

    def render(self, messages: list[dict[str, Any]], generate: bool) -> str:
        """The text of a conversation; with ``generate`` it ends where the assistant's answer begins.

        Raises:
            RealmError: ``invalid_params`` (``details.param`` is ``messages``) if the messages are not
                what the template takes, or are too many or too long.
        """
        _check_messages(messages)
        context = self._special_tokens | {
            "messages": messages,
            "tools": None,
            "documents": None,
            "add_generation_prompt": generate,
        }
        pieces: list[str] = []
        size = 0
        deadline = time.monotonic() + MAX_SECONDS
        try:
            for piece in self._template.generate(context):
                size += len(piece)
                if size > MAX_OUTPUT:
                    raise _bad_messages(f"the chat template gives more than {MAX_OUTPUT} characters")
                if time.monotonic() > deadline:
                    raise _bad_messages(f"the chat template took more than {MAX_SECONDS:g} s")
                pieces.append(piece)
        except _RENDER_ERRORS as error:
            raise _bad_messages(f"the chat template refused the messages: {error}") from error
        return "".join(pieces)


def _check_messages(messages: object) -> None:
    if not isinstance(messages, list) or not messages:
        raise _bad_messages("messages must be a list with at least one message")
    if len(messages) > MAX_MESSAGES:
        raise _bad_messages(f"there are {len(messages)} messages; the limit is {MAX_MESSAGES}")
    for number, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise _bad_messages(f'messages[{number}] must be an object with a text "role"')
        if _depth(message) > _MAX_DEPTH:
            raise _bad_messages(f"messages[{number}] is nested more than {_MAX_DEPTH} deep")
    try:
        size = len(msgspec.json.encode(messages))
    except (TypeError, ValueError, RecursionError) as error:
        raise _bad_messages(f"messages cannot be written as JSON: {error}") from error
    if size > MAX_INPUT:
        raise _bad_messages(f"the messages have {size} bytes; the limit is {MAX_INPUT}")


def _depth(value: Any) -> int:
    """Levels of lists and objects in ``value``, counted up to one more than is allowed."""
    level, depth = [value], 0
    while level and depth <= _MAX_DEPTH:
        containers = [v for v in level if isinstance(v, dict | list)]
        level = [child for v in containers for child in (v.values() if isinstance(v, dict) else v)]
        depth += 1
    return depth


def _bad_template(problem: str) -> RealmError:
    return RealmError("model_invalid", f"the chat_template {problem}", details={"field": "chat_template"})


def _bad_messages(problem: str) -> RealmError:
    return RealmError("invalid_params", problem, details={"param": "messages"})
