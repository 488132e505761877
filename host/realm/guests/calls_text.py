"""Host functions on text and facts: tokenize, detokenize, chat template, model information."""

from __future__ import annotations

from array import array
from typing import Any

import msgspec

from realm.errors import RealmError
from realm.guests.abi import CONSTANTS, ErrorCode
from realm.guests.calls_model import check_tokens
from realm.guests.decoding import LAYOUTS, Refused, Room
from realm.guests.deferral import deferred
from realm.guests.run import DetokenizeStream, GuestRun

TOKENIZE_SPECIAL = CONSTANTS["TOKENIZE_SPECIAL"][0]
DETOKENIZE_SPECIAL = CONSTANTS["DETOKENIZE_SPECIAL"][0]
CHAT_GENERATE = CONSTANTS["CHAT_GENERATE"][0]
MODEL_CHAT_TEMPLATE = CONSTANTS["MODEL_CHAT_TEMPLATE"][0]

_MODEL_INFO = LAYOUTS["realm_model_info"]
_TEXT_FUEL = 200
"""Fuel a byte of text that is tokenized or rendered: about what the host's time is worth."""


def fill(run: GuestRun, out: Room, data: bytes) -> int:
    """Write bytes if there is room for all; the needed length either way."""
    if len(data) <= out.capacity:
        run.memory.write(out.pointer, data)
    return len(data)


class TextCalls:
    """Group text of the table."""

    @deferred
    def tokenize(self, run: GuestRun, text: str, flags: int, out: Room) -> int:
        run.charge(_TEXT_FUEL * len(text))
        ids = run.runtime.tokenizer.encode(text, bool(flags & TOKENIZE_SPECIAL))
        if len(ids) <= out.capacity:
            run.memory.write(out.pointer, array("I", ids).tobytes())
        return len(ids)

    def detokenize(self, run: GuestRun, stream: int, tokens: bytes, flags: int, out: Room) -> int:
        check_tokens(run, tokens, "tokens")
        run.charge(len(tokens) << 4)
        special = bool(flags & DETOKENIZE_SPECIAL)
        if stream == 0:
            text = run.runtime.tokenizer.decode(array("I", tokens), special)
            return fill(run, out, text.encode())
        state = run.streams.get(stream)
        if state is None:
            if not tokens:
                return 0
            state = run.streams[stream] = DetokenizeStream(run.runtime.tokenizer.stream(special), flags)
        elif state.flags != flags:
            raise Refused(ErrorCode.INVALID_ARGUMENT, f"flags is {flags}, but stream {stream} began with {state.flags}")
        # A call that is repeated with more room must not push its tokens again.
        if state.unread_tokens != tokens:
            piece = state.stream.push(array("I", tokens)) if tokens else state.stream.flush()
            state.unread += piece.encode()
        needed = fill(run, out, state.unread)
        if needed > out.capacity:
            state.unread_tokens = tokens
            return needed
        state.unread, state.unread_tokens = b"", None
        if not tokens:
            del run.streams[stream]
        return needed

    @deferred
    def chat_template(self, run: GuestRun, messages: str, flags: int, out: Room) -> int:
        run.charge(_TEXT_FUEL * len(messages))
        tokenizer = run.runtime.tokenizer
        if not tokenizer.has_chat_template:
            raise Refused(ErrorCode.NOT_SUPPORTED, "the model has no chat template")
        try:
            conversation = msgspec.json.decode(messages, type=list[dict[str, Any]])
        except (msgspec.MsgspecError, RecursionError) as error:
            raise RealmError("invalid_params", f"messages: {error}") from None
        return fill(run, out, tokenizer.chat(conversation, bool(flags & CHAT_GENERATE)).encode())

    def model_info(self, run: GuestRun, out: int) -> int:
        facts = run.runtime.facts
        run.memory.pack(
            _MODEL_INFO,
            out,
            facts.vocab_size,
            facts.context_length,
            -1 if facts.bos is None else facts.bos,
            min(facts.eos, default=-1),
            facts.mask_words,
            facts.layers,
            facts.hidden_size,
            MODEL_CHAT_TEMPLATE if run.runtime.tokenizer.has_chat_template else 0,
        )
        return 0
