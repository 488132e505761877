"""Guest ABI version 1, as data: the one source of truth.

Argument decoding and checks, ``realm.h``, the Zig declarations, ``realm_abi.md`` and the tests of
the boundary are derived from the tables here. Adding a host function is one entry in
:data:`FUNCTIONS` and one method of the same name in :mod:`realm.guests.hostcalls`.

Conventions. All integers are little-endian. Pointers and lengths are unsigned function parameters,
32 bits wide, or 64 for a guest whose memory is a 64-bit one; *inside structs* a pointer is always
64 bits wide, so that one layout serves both. Pointers need no alignment: the host copies bytes.
Buffers of one call may overlap: all that is read is read before anything is written. A function
returns ``i32`` or ``i64``; a negative value is an error code. Functions that fill a buffer return
the needed length; when that is more than the capacity, nothing is written and the guest may call
again with more room.
"""

from __future__ import annotations

from typing import Literal

from realm.guests.abi_types import (
    ErrorCode,
    Field,
    Function,
    Handle,
    InOut,
    Input,
    Output,
    Parameter,
    Scalar,
    StructIn,
    StructOut,
    StructType,
)

__all__ = [
    "ABI_VERSION",
    "BIAS",
    "BY_NAME",
    "CANDIDATE",
    "CONSTANTS",
    "ERROR_DOCS",
    "FUNCTIONS",
    "IMPORT_MODULE",
    "ITEM",
    "MAX_BATCH_BYTES",
    "MAX_DETOKENIZED",
    "MAX_MESSAGES",
    "MAX_SCORED",
    "MAX_TEXT",
    "MODEL_INFO",
    "SAMPLING",
    "SPECULATION",
    "STRUCTS",
    "TOKEN",
    "ErrorCode",
    "Field",
    "Function",
    "Handle",
    "InOut",
    "Input",
    "Output",
    "Parameter",
    "Scalar",
    "StructIn",
    "StructOut",
    "StructType",
    "wasm_parameters",
]

ABI_VERSION = 1
IMPORT_MODULE = "realm"

# What one call may take: what a context of 65,536 tokens holds, or all the tokens there are to ask for.
MAX_TEXT = 256 << 10
MAX_MESSAGES = 256 << 10
MAX_DETOKENIZED = 65_536
MAX_SCORED = 1 << 18
MAX_BATCH_BYTES = 4 << 20
"""Tokens, masks and biases of one ``batch_forward``."""

ERROR_DOCS: dict[ErrorCode, str] = {
    ErrorCode.INVALID_ARGUMENT: "a value is out of its range (the run's log says which)",
    ErrorCode.BAD_POINTER: "a pointer and length reach outside the guest's memory",
    ErrorCode.BAD_HANDLE: "no such sequence: never made, freed, or another guest's",
    ErrorCode.NOT_SUPPORTED: "this engine does not support the function",
    ErrorCode.CONTEXT_FULL: "the sequence would be longer than the model's context",
    ErrorCode.LIMIT: "a limit of the run or tenant is met (the run's log names it)",
    ErrorCode.NOT_FOUND: "no such name or key, or the adapter cannot be loaded",
    ErrorCode.NO_LOGITS: "the sequence has no logits: call forward without sampling, or with KEEP_LOGITS",
    ErrorCode.TIMED_OUT: "the time given has passed",
    ErrorCode.CLOSED: "the client has gone or the run is ending",
    ErrorCode.OUT_OF_MEMORY: "the sequence alone needs more KV pages, or its adapter more memory, than the engine has",
    ErrorCode.BAD_UTF8: "text is not valid UTF-8",
    ErrorCode.INTERNAL: "the host failed; its log has the cause under the correlation id in the run's log",
}

# --- structs ------------------------------------------------------------------------------------

SAMPLING = StructType(
    "realm_sampling",
    "How to draw the next token. All zero except the ones marked is greedy; realm.h has REALM_GREEDY.",
    (
        Field("temperature", "f32", "0 is greedy; at most 100"),
        Field("top_p", "f32", "smallest set of tokens whose mass reaches this; 1 (or 0) is off"),
        Field("min_p", "f32", "drop tokens less likely than this fraction of the best; 0 is off"),
        Field("repetition_penalty", "f32", "CTRL's penalty over the whole sequence; 1 (or 0) is off"),
        Field("top_k", "u32", "keep the k most likely tokens; 0 is off"),
        Field("flags", "u32", "bits of SAMPLE_*"),
        Field("seed", "u64", "used with SAMPLE_SEED in place of the run's seed"),
        Field("mask", "u64", "pointer to uint32 words, bit t of the whole allows token t; 0 is none"),
        Field("bias", "u64", "pointer to realm_bias entries; 0 is none"),
        Field("mask_words", "u32", "must be ceil(vocab_size / 32) when mask is given"),
        Field("bias_count", "u32", "entries at bias, at most 4096"),
    ),
)

BIAS = StructType(
    "realm_bias",
    "Added to one token's logit before sampling.",
    (Field("token", "u32", "token id"), Field("value", "f32", "finite")),
)

TOKEN = StructType(
    "realm_token",
    "What a draw gave.",
    (
        Field("token", "i32", "the token, or -1 when no sampling was asked for"),
        Field(
            "logprob",
            "f32",
            "log-probability under the model (temperature 1, nothing applied); NaN unless SAMPLE_LOGPROB",
        ),
        Field("length", "u32", "the sequence's length in tokens, without this token"),
        Field("flags", "u32", "bits of TOKEN_*"),
    ),
)

ITEM = StructType(
    "realm_item",
    "One sequence's part of batch_forward; the last four fields are the host's answer.",
    (
        Field("seq", "i32", "sequence handle; each at most once in a batch"),
        Field("count", "u32", "number of tokens, at least 1"),
        Field("tokens", "u64", "pointer to uint32 token ids"),
        Field("sampling", "u64", "pointer to a realm_sampling, or 0"),
        Field("token", "i32", "as realm_token.token, or this item's error code"),
        Field("logprob", "f32", "as realm_token.logprob"),
        Field("length", "u32", "as realm_token.length"),
        Field("flags", "u32", "as realm_token.flags"),
    ),
)

CANDIDATE = StructType(
    "realm_candidate",
    "A token and its log-probability under the model.",
    (Field("token", "u32", "token id"), Field("logprob", "f32", "natural logarithm")),
)

MODEL_INFO = StructType(
    "realm_model_info",
    "Facts about the model.",
    (
        Field("vocab_size", "u32", "logits per position"),
        Field("context_length", "u32", "longest sequence in tokens"),
        Field("bos", "i32", "beginning-of-sequence token, or -1"),
        Field("eos", "i32", "first end-of-sequence token, or -1"),
        Field("mask_words", "u32", "uint32 words of an allowed-token mask"),
        Field("layers", "u32", "transformer layers"),
        Field("hidden_size", "u32", "width of the residual stream"),
        Field("flags", "u32", "bits of MODEL_*"),
    ),
)

SPECULATION = StructType(
    "realm_speculation",
    "Where drafts come from and how the target is sampled.",
    (
        Field("source", "u32", "0 paired model, 1 n-gram look-up, 2 the guest's own tokens"),
        Field("draft_length", "u32", "most tokens to draft in this round; 0 lets the engine choose"),
        Field("tokens", "u64", "pointer to the guest's own drafted uint32 tokens, for source 2"),
        Field("count", "u32", "tokens at tokens"),
        Field("flags", "u32", "0"),
        Field("sampling", "u64", "pointer to a realm_sampling; 0 is greedy"),
        Field("proposed", "u32", "answer: tokens drafted"),
        Field("accepted", "u32", "answer: of those, accepted"),
    ),
)

STRUCTS = (SAMPLING, BIAS, TOKEN, ITEM, CANDIDATE, MODEL_INFO, SPECULATION)

CONSTANTS: dict[str, tuple[int, str]] = {
    "SAMPLE_LOGPROB": (1, "realm_sampling.flags: also return the log-probability"),
    "SAMPLE_KEEP_LOGITS": (2, "realm_sampling.flags: also keep the logits for logits_*, sample and score"),
    "SAMPLE_SEED": (4, "realm_sampling.flags: draw with realm_sampling.seed"),
    "TOKEN_EOS": (1, "realm_token.flags: the token ends a sequence"),
    "MODEL_CHAT_TEMPLATE": (1, "realm_model_info.flags: chat_template works"),
    "TOKENIZE_SPECIAL": (1, "tokenize flags: text may contain special tokens such as <|im_start|>"),
    "DETOKENIZE_SPECIAL": (1, "detokenize flags: write special tokens too"),
    "CHAT_GENERATE": (1, "chat_template flags: end with the start of the assistant's turn"),
    "LOG_DEBUG": (0, "log level"),
    "LOG_INFO": (1, "log level"),
    "LOG_WARNING": (2, "log level"),
    "LOG_ERROR": (3, "log level"),
}

# --- parameters ---------------------------------------------------------------------------------

_E = ErrorCode
_NAME = {"low": 1, "high": 128, "utf8": True}

FUNCTIONS: tuple[Function, ...] = (
    # model, suspends
    Function(
        "forward",
        "model",
        "Append tokens to a sequence and compute; with sampling, draw the next token (not appended).",
        (
            Handle("seq"),
            Input("tokens", "u32", "token ids to append", count="n", low=1, high=1 << 20),
            StructIn("sampling", SAMPLING, "how to draw; null only computes, and keeps the logits", optional=True),
            StructOut("out", TOKEN, "what was drawn", optional=True),
        ),
        "the drawn token, or 0 without sampling",
        suspends=True,
        errors=(_E.CONTEXT_FULL, _E.LIMIT, _E.NOT_FOUND, _E.OUT_OF_MEMORY, _E.INTERNAL),
    ),
    Function(
        "batch_forward",
        "model",
        "forward for several sequences in one suspension. Each item has its own answer or error. All their "
        "tokens, masks and biases together may have 4 MiB; an item beyond that is an INVALID_ARGUMENT.",
        (InOut("items", ITEM, "one entry a sequence"),),
        "how many items succeeded",
        suspends=True,
    ),
    Function(
        "lora_apply",
        "model",
        "From now on the sequence computes with this LoRA adapter, as if from its first token; empty removes it. "
        "Its tokens stay, and its next forward computes them anew; its kept logits go. Waits until the adapter is in "
        "memory. After an error the sequence is as it was.",
        (
            Handle("seq"),
            Input("name", "u8", "of this tenant's adapters, else of the shared ones", low=0, high=128, utf8=True),
        ),
        "0",
        suspends=True,
        errors=(_E.NOT_SUPPORTED, _E.NOT_FOUND, _E.LIMIT, _E.OUT_OF_MEMORY, _E.INTERNAL),
    ),
    Function(
        "speculative_step",
        "model",
        "One draft-and-verify round: 1..k+1 tokens distributed exactly as the target's.",
        (
            Handle("seq"),
            StructIn("params", SPECULATION, "draft source and sampling"),
            Output("out", "u32", "the tokens"),
        ),
        "how many tokens",
        suspends=True,
        errors=(_E.NOT_SUPPORTED,),
    ),
    # model, local
    Function(
        "logits_read",
        "logits",
        "Copy the sequence's last logits (before any penalty, bias or temperature).",
        (Handle("seq"), Output("out", "f32", "vocab_size values")),
        "vocab_size",
        errors=(_E.NO_LOGITS,),
    ),
    Function(
        "logits_topk",
        "logits",
        "The most likely next tokens, best first; equal ones by id.",
        (Handle("seq"), Output("out", CANDIDATE, "as many as there is room for", high=65_536)),
        "how many were written",
        errors=(_E.NO_LOGITS,),
    ),
    Function(
        "sample",
        "logits",
        "Draw from the kept logits as forward would.",
        (
            Handle("seq"),
            StructIn("sampling", SAMPLING, "how to draw"),
            StructOut("out", TOKEN, "what was drawn", optional=True),
        ),
        "the drawn token",
        errors=(_E.NO_LOGITS,),
    ),
    Function(
        "score",
        "logits",
        "Log-probabilities that the kept logits give to tokens.",
        (
            Handle("seq"),
            Input("tokens", "u32", "token ids", count="n", low=1, high=MAX_SCORED),
            Output("out", "f32", "one value a token"),
        ),
        "how many values were written",
        errors=(_E.NO_LOGITS,),
    ),
    # sequences
    Function("seq_new", "sequences", "A new, empty sequence.", (), "its handle", errors=(_E.LIMIT,)),
    Function(
        "seq_fork",
        "sequences",
        "A copy that shares what is computed so far (copy-on-write; kept logits and adapter too).",
        (Handle("seq"),),
        "the copy's handle",
        errors=(_E.LIMIT,),
    ),
    Function(
        "seq_truncate",
        "sequences",
        "Drop the tokens after the first length; the kept logits go too.",
        (Handle("seq"), Scalar("length", "u32", "at most the present length")),
        "the new length",
    ),
    Function("seq_len", "sequences", "Length in tokens.", (Handle("seq"),), "the length"),
    Function("seq_free", "sequences", "Give the sequence back.", (Handle("seq"),), "0"),
    Function(
        "seq_save",
        "sequences",
        "Keep a copy under a name of this tenant, for later runs (until the engine restarts). It has the same adapter.",
        (Handle("seq"), Input("name", "u8", "any text", **_NAME)),  # type: ignore[arg-type]
        "its length in tokens",
        suspends=True,
        errors=(_E.LIMIT, _E.INTERNAL),
    ),
    Function(
        "seq_open",
        "sequences",
        "Open a copy of a saved sequence.",
        (Input("name", "u8", "as saved", **_NAME),),  # type: ignore[arg-type]
        "its handle",
        suspends=True,
        errors=(_E.NOT_FOUND, _E.LIMIT, _E.INTERNAL),
    ),
    # text
    Function(
        "tokenize",
        "text",
        "Text to token ids. No token is added at the front.",
        (
            Input("text", "u8", "text", high=MAX_TEXT, utf8=True),
            Scalar("flags", "u32", "bits of TOKENIZE_*", low=0, high=1),
            Output("out", "u32", "token ids"),
        ),
        "how many tokens there are",
    ),
    Function(
        "detokenize",
        "text",
        "Token ids to text. With a stream number the pieces of one text are given as soon as their "
        "characters are whole; n = 0 ends the stream and gives what is left. Text that did not fit is given "
        "by the same call again; a stream (or all together) with too much of it takes no more tokens.",
        (
            Scalar("stream", "u32", "0, or a number the guest chose for this stream", low=0, high=1023),
            Input("tokens", "u32", "token ids", count="n", low=0, high=MAX_DETOKENIZED),
            Scalar("flags", "u32", "bits of DETOKENIZE_*", low=0, high=1),
            Output("out", "u8", "UTF-8"),
        ),
        "bytes of text",
        errors=(_E.LIMIT,),
    ),
    Function(
        "chat_template",
        "text",
        "Render messages with the model's chat template.",
        (
            Input(
                "messages", "u8", 'JSON: [{"role": "user", "content": "..."}, ...]', low=2, high=MAX_MESSAGES, utf8=True
            ),
            Scalar("flags", "u32", "bits of CHAT_*", low=0, high=1),
            Output("out", "u8", "UTF-8, to be tokenized with TOKENIZE_SPECIAL"),
        ),
        "bytes of text",
        errors=(_E.NOT_SUPPORTED,),
    ),
    Function("model_info", "text", "Facts about the model.", (StructOut("out", MODEL_INFO, "the facts"),), "0"),
    # session
    Function("input_len", "session", "Bytes of the run's input.", (), "the length"),
    Function(
        "input_read",
        "session",
        "Copy input from an offset on; as much as there is room for.",
        (Scalar("offset", "u32", "at most input_len"), Output("out", "u8", "the bytes")),
        "how many bytes were copied",
    ),
    Function(
        "emit",
        "session",
        "Send output (UTF-8 text) to the client. A slow client makes its own guest wait here.",
        (Input("data", "u8", "text; a character may be split over two calls", high=1 << 20),),
        "0",
        suspends=True,
        errors=(_E.LIMIT, _E.CLOSED),
    ),
    Function(
        "recv",
        "session",
        "Wait for a message from the client. A message longer than the room stays for the next call.",
        (Output("out", "u8", "the message"), Scalar("timeout_ms", "u32", "most milliseconds to wait; 0 does not wait")),
        "bytes of the message",
        suspends=True,
        errors=(_E.TIMED_OUT, _E.CLOSED),
    ),
    Function(
        "log",
        "session",
        "A line for the run's log.",
        (
            Scalar("level", "u32", "LOG_*", low=0, high=3),
            Input("text", "u8", "text; bad UTF-8 is replaced", high=65_536),
        ),
        "0",
        errors=(_E.LIMIT,),
    ),
    # store, misc
    Function(
        "kv_get",
        "store",
        "Read a value of this tenant's store.",
        (Input("key", "u8", "key", **_NAME), Output("out", "u8", "the value")),  # type: ignore[arg-type]
        "bytes of the value",
        suspends=True,
        errors=(_E.NOT_FOUND, _E.INTERNAL),
    ),
    Function(
        "kv_set",
        "store",
        "Write a value of this tenant's store; an empty value removes the key.",
        (Input("key", "u8", "key", **_NAME), Input("value", "u8", "the value", high=65_536)),  # type: ignore[arg-type]
        "0",
        suspends=True,
        errors=(_E.LIMIT, _E.INTERNAL),
    ),
    Function("now", "misc", "Milliseconds since 1970-01-01 UTC.", (), "the time", result="i64"),
    Function("random", "misc", "63 random bits, the same for the same run seed.", (), "the bits", result="i64"),
    Function("fuel_left", "misc", "Fuel units the run may still burn.", (), "the fuel", result="i64"),
    Function("tokens_left", "misc", "Tokens the run may still forward.", (), "the tokens", result="i64"),
)

BY_NAME: dict[str, Function] = {f.name: f for f in FUNCTIONS}


def wasm_parameters(function: Function, wide: bool = False) -> list[Literal["i32", "i64"]]:
    """The WASM parameter types of a host function; ``wide`` is for a guest with a 64-bit memory."""
    address: Literal["i32", "i64"] = "i64" if wide else "i32"
    types: list[Literal["i32", "i64"]] = []
    for p in function.parameters:
        match p:
            case Scalar():
                types.append("i64" if p.kind in ("i64", "u64") else "i32")
            case Handle():
                types.append("i32")
            case Input() | Output() | InOut():
                types += [address, address]
            case StructIn() | StructOut():
                types.append(address)
    return types
