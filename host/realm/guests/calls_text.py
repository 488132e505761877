"""Host functions on text and facts: tokenize, detokenize, chat template, model information."""

from __future__ import annotations

from array import array
from functools import partial
from typing import Any

import msgspec

from realm.errors import RealmError
from realm.guests.abi import CONSTANTS, ErrorCode
from realm.guests.decoding import LAYOUTS, Refused, Room
from realm.guests.facts import TokenizerLike
from realm.guests.run import DetokenizeStream, GuestRun
from realm.guests.sampling_arguments import check_tokens

TOKENIZE_SPECIAL = CONSTANTS["TOKENIZE_SPECIAL"][0]
DETOKENIZE_SPECIAL = CONSTANTS["DETOKENIZE_SPECIAL"][0]
CHAT_GENERATE = CONSTANTS["CHAT_GENERATE"][0]
MODEL_CHAT_TEMPLATE = CONSTANTS["MODEL_CHAT_TEMPLATE"][0]

_MODEL_INFO = LAYOUTS["realm_model_info"]
TEXT_FUEL = 2_000
"""Fuel a byte of text that is tokenized or rendered: 0.2 to 1.7 us for the one, 0.01 to 0.3 for the other."""
TOKEN_FUEL = 300
"""Fuel a token that becomes text: 0.08 us."""
MAX_WAITING = 1 << 20
"""Bytes of text without room that all streams of a run may keep before they take no more tokens."""


def fill(run: GuestRun, out: Room, data: bytes) -> int:
    """Write bytes if there is room for all; the needed length either way."""
    if len(data) <= out.capacity:
        run.memory.write(out.pointer, data)
    return len(data)


class TextCalls:
    """Group text of the table."""

    def tokenize(self, run: GuestRun, text: str, flags: int, out: Room) -> None:
        special = bool(flags & TOKENIZE_SPECIAL)
        fuel = TEXT_FUEL * len(text.encode())
        run.work(fuel, partial(_encode, run.runtime.tokenizer, text, special), partial(_write_tokens, run, out))

    def detokenize(self, run: GuestRun, stream: int, tokens: bytes, flags: int, out: Room) -> int | None:
        check_tokens(run, tokens, "tokens")
        special = bool(flags & DETOKENIZE_SPECIAL)
        fuel = TOKEN_FUEL * (len(tokens) >> 2)
        if stream == 0:
            run.work(fuel, partial(_decode, run.runtime.tokenizer, tokens, special), partial(fill, run, out))
            return None
        state = run.streams.get(stream)
        if state is None:
            if not tokens:
                return 0
            state = run.streams[stream] = DetokenizeStream(run.runtime.tokenizer.stream(special), flags)
        elif state.flags != flags:
            raise Refused(ErrorCode.INVALID_ARGUMENT, f"flags is {flags}, but stream {stream} began with {state.flags}")
        # A call that is repeated with more room must not push its tokens again.
        if state.unread_tokens == tokens:
            return _take(run, stream, state, tokens, out, "")
        if tokens and run.unread > MAX_WAITING:
            raise Refused(ErrorCode.LIMIT, f"{run.unread:,} bytes wait in the streams already; take them first")
        if len(tokens) == 4:
            # One token is a look-up, which is done sooner than it is put off.
            run.debt += fuel
            piece = state.stream.push((int.from_bytes(tokens, "little"),))
            return _take(run, stream, state, tokens, out, piece)
        run.work(fuel, partial(_push, state, tokens), partial(_take, run, stream, state, tokens, out))
        return None

    def chat_template(self, run: GuestRun, messages: str, flags: int, out: Room) -> None:
        tokenizer = run.runtime.tokenizer
        if not tokenizer.has_chat_template:
            raise Refused(ErrorCode.NOT_SUPPORTED, "the model has no chat template")
        fuel = TEXT_FUEL * len(messages)
        generate = bool(flags & CHAT_GENERATE)
        run.work(fuel, partial(_render, tokenizer, messages, generate), partial(fill, run, out))

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


# --- work, which any thread may do ------------------------------------------------------------------


def _encode(tokenizer: TokenizerLike, text: str, special: bool) -> bytes:
    return array("I", tokenizer.encode(text, special)).tobytes()


def _decode(tokenizer: TokenizerLike, tokens: bytes, special: bool) -> bytes:
    return tokenizer.decode(array("I", tokens), special).encode()


def _push(state: DetokenizeStream, tokens: bytes) -> str:
    return state.stream.push(array("I", tokens)) if tokens else state.stream.flush()


def _render(tokenizer: TokenizerLike, messages: str, generate: bool) -> bytes:
    try:
        conversation = msgspec.json.decode(messages, type=list[dict[str, Any]])
    except (msgspec.MsgspecError, RecursionError) as error:
        raise RealmError("invalid_params", f"messages: {error}") from None
    return tokenizer.chat(conversation, generate).encode()


# --- answers ----------------------------------------------------------------------------------------


def _write_tokens(run: GuestRun, out: Room, ids: bytes) -> int:
    count = len(ids) >> 2
    if count <= out.capacity:
        run.memory.write(out.pointer, ids)
    return count


def _take(run: GuestRun, number: int, state: DetokenizeStream, tokens: bytes, out: Room, piece: str) -> int:
    """Give what a stream has, or keep it for a call with more room."""
    if tokens and not state.unread:
        data = piece.encode()
        if len(data) <= out.capacity:
            run.memory.write(out.pointer, data)
            return len(data)
    before = len(state.unread) + len(state.unread_tokens or b"")
    state.unread += piece.encode()
    needed = fill(run, out, state.unread)
    if needed > out.capacity:
        state.unread_tokens = tokens
        run.unread += needed + len(tokens) - before
        return needed
    run.unread -= before
    state.unread, state.unread_tokens = b"", None
    if not tokens:
        del run.streams[number]
    return needed
