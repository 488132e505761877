"""Host functions on the model and on sequences: forward, logits, fork, truncate, save."""

from __future__ import annotations

import math
import struct
from array import array
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from realm.guests.abi import CONSTANTS, ErrorCode
from realm.guests.decoding import LAYOUTS, Refused, Room, Rows
from realm.guests.deferral import deferred
from realm.guests.fiber_types import OutOfBounds
from realm.guests.run import GuestRun
from realm.guests.sampling_reference import draw_token, log_probabilities, most_likely
from realm.guests.sequences import GuestSequence
from realm.messages import (
    CallDone,
    CallFailed,
    EngineResult,
    ForkSequence,
    Forward,
    ForwardDone,
    FreeSequence,
    OpenSaved,
    SamplingParams,
    SaveSequence,
    TruncateSequence,
)

LOGPROB = CONSTANTS["SAMPLE_LOGPROB"][0]
KEEP_LOGITS = CONSTANTS["SAMPLE_KEEP_LOGITS"][0]
SEED = CONSTANTS["SAMPLE_SEED"][0]
TOKEN_EOS = CONSTANTS["TOKEN_EOS"][0]
MAX_BIAS = 4096

_TOKEN = LAYOUTS["realm_token"]
_SAMPLING = LAYOUTS["realm_sampling"]
_ITEM = LAYOUTS["realm_item"]
_ITEM_ANSWER = struct.Struct("<ifII")
_ITEM_ANSWER_AT = 24
_CANDIDATE = LAYOUTS["realm_candidate"]
_NAN = math.nan
_SMALL = 64


class ModelCalls:
    """Groups model, logits and sequences of the table."""

    # --- forward ----------------------------------------------------------------------------------

    def forward(
        self, run: GuestRun, seq: GuestSequence, tokens: bytes, sampling: tuple[Any, ...] | None, out: int
    ) -> int | None:
        params, keep = _prepare(run, seq, tokens, sampling)
        call = run.call(partial(_forward_done, run, seq, tokens, out))
        run.op(Forward(call, seq.id, tokens, params, keep))
        return None

    def batch_forward(self, run: GuestRun, items: Rows) -> int | None:
        seen: set[int] = set()
        batch = _Batch(run)
        ops: list[Forward] = []
        for number, (handle, count, tokens_at, sampling_at, *_) in enumerate(items.rows):
            at = items.pointer + number * _ITEM.size + _ITEM_ANSWER_AT
            try:
                seq = run.sequences.get(handle)
                if seq is None or handle in seen:
                    why = "is in the batch already" if handle in seen else "is no sequence of this run"
                    raise Refused(ErrorCode.BAD_HANDLE, f"seq {handle} {why}")
                seen.add(handle)
                if not 1 <= count <= 1 << 20:
                    raise Refused(ErrorCode.INVALID_ARGUMENT, f"count is {count}; it must be 1..{1 << 20}")
                try:
                    tokens = run.memory.read(tokens_at, count * 4)
                    sampling = run.memory.unpack(_SAMPLING, sampling_at) if sampling_at else None
                except OutOfBounds:
                    raise Refused(ErrorCode.BAD_POINTER, "tokens or sampling reach outside the memory") from None
                params, keep = _prepare(run, seq, tokens, sampling)
            except Refused as refused:
                run.warn(f"batch_forward: items[{number}]: {refused.text}")
                run.memory.pack(_ITEM_ANSWER, at, int(refused.code), _NAN, 0, 0)
                continue
            call = run.call(partial(batch.done, seq, tokens, at))
            batch.missing += 1
            ops.append(Forward(call, seq.id, tokens, params, keep))
        for op in ops:
            run.op(op)
        return None if ops else 0

    def lora_apply(self, run: GuestRun, seq: GuestSequence, name: str) -> int:
        raise Refused(ErrorCode.NOT_SUPPORTED, "this engine has no adapters")

    def speculative_step(self, run: GuestRun, seq: GuestSequence, params: tuple[Any, ...], out: Room) -> int:
        source, _length, tokens_at, count, flags, sampling_at, *_ = params
        if source > 2 or flags:
            raise Refused(ErrorCode.INVALID_ARGUMENT, f"params: source {source}, flags {flags}")
        if count > 1 << 20:
            raise Refused(ErrorCode.INVALID_ARGUMENT, f"params.count is {count}")
        try:
            check_tokens(run, run.memory.read(tokens_at, count * 4), "params.tokens")
            if sampling_at:
                _decode_sampling(run, run.memory.unpack(_SAMPLING, sampling_at))
        except OutOfBounds:
            raise Refused(ErrorCode.BAD_POINTER, "params: tokens or sampling reach outside the memory") from None
        raise Refused(ErrorCode.NOT_SUPPORTED, "this engine does not speculate for guests")

    # --- logits -----------------------------------------------------------------------------------

    def logits_read(self, run: GuestRun, seq: GuestSequence, out: Room) -> int:
        data = _logits(seq)
        run.charge(len(data) >> 4)
        count = len(data) >> 2
        if count <= out.capacity:
            run.memory.write(out.pointer, data)
        return count

    @deferred
    def logits_topk(self, run: GuestRun, seq: GuestSequence, out: Room) -> int:
        logits = _logit_array(run, seq)
        tokens, logprobs = most_likely(logits, out.capacity)
        pairs = np.empty(len(tokens), dtype=[("token", "<u4"), ("logprob", "<f4")])
        pairs["token"], pairs["logprob"] = tokens, logprobs
        run.memory.write(out.pointer, pairs.tobytes())
        return len(tokens)

    @deferred
    def sample(self, run: GuestRun, seq: GuestSequence, sampling: tuple[Any, ...], out: int) -> int:
        logits = _logit_array(run, seq)
        decoded = _decode_sampling(run, sampling)
        penalty = decoded.params.repetition_penalty
        if penalty != 1.0 and seq.unknown:
            raise Refused(
                ErrorCode.NOT_SUPPORTED,
                "repetition_penalty needs the tokens of a sequence that was opened by name; let forward sample",
            )
        history = np.frombuffer(seq.tokens(), dtype="<u4") if penalty != 1.0 else None
        params = _with_draw(seq, decoded)
        try:
            token, logprob = draw_token(logits, params, history)
        except ValueError as error:
            raise Refused(ErrorCode.INVALID_ARGUMENT, f"sampling: {error}") from None
        seq.sampled = token
        run.usage.new_tokens += 1
        if out:
            eos = TOKEN_EOS if token in run.runtime.facts.eos else 0
            run.memory.pack(_TOKEN, out, token, logprob, seq.length, eos)
        return token

    @deferred
    def score(self, run: GuestRun, seq: GuestSequence, tokens: bytes, out: Room) -> int:
        logits = _logit_array(run, seq)
        check_tokens(run, tokens, "tokens")
        count = len(tokens) >> 2
        if count <= out.capacity:
            values = log_probabilities(logits, np.frombuffer(tokens, dtype="<u4"))
            run.memory.write(out.pointer, values.astype("<f4").tobytes())
        return count

    # --- sequences --------------------------------------------------------------------------------

    def seq_new(self, run: GuestRun) -> int:
        return run.open_sequence()

    def seq_fork(self, run: GuestRun, seq: GuestSequence) -> int:
        child = run.new_sequence(seq)
        run.op(ForkSequence(seq.id, child.id))
        return run.add_sequence(child)

    def seq_truncate(self, run: GuestRun, seq: GuestSequence, length: int) -> int:
        if length > seq.length:
            raise Refused(ErrorCode.INVALID_ARGUMENT, f"length is {length}; the sequence has {seq.length}")
        seq.truncate(length)
        run.op(TruncateSequence(seq.id, length))
        return length

    def seq_len(self, run: GuestRun, seq: GuestSequence) -> int:
        return seq.length

    def seq_free(self, run: GuestRun, seq: GuestSequence) -> int:
        run.drop_sequence(seq)
        run.op(FreeSequence(seq.id))
        return 0

    def seq_save(self, run: GuestRun, seq: GuestSequence, name: str) -> None:
        call = run.call(partial(_value_done, run, "seq_save"))
        run.op(SaveSequence(call, seq.id, name))

    def seq_open(self, run: GuestRun, name: str) -> None:
        seq = run.new_sequence()
        handle = run.add_sequence(seq)
        call = run.call(partial(_opened, run, seq, handle))
        run.op(OpenSaved(call, seq.id, run.start.tenant, run.start.run, name))


# --- checks ---------------------------------------------------------------------------------------


def check_tokens(run: GuestRun, tokens: bytes, name: str) -> None:
    if not tokens:
        return
    if len(tokens) == 4:
        highest = int.from_bytes(tokens, "little")
    elif len(tokens) <= _SMALL * 4:
        highest = max(array("I", tokens))
    else:
        highest = int(np.frombuffer(tokens, dtype="<u4").max())
    vocab = run.runtime.facts.vocab_size
    if highest >= vocab:
        raise Refused(ErrorCode.INVALID_ARGUMENT, f"{name}: {highest} is not below the vocabulary's size {vocab:,}")


def _prepare(
    run: GuestRun, seq: GuestSequence, tokens: bytes, sampling: tuple[Any, ...] | None
) -> tuple[SamplingParams | None, bool]:
    """Check one forward, account for its tokens, and give its sampling and whether to keep logits."""
    check_tokens(run, tokens, "tokens")
    params: SamplingParams | None = None
    keep = True
    decoded = None if sampling is None else _decode_sampling(run, sampling)
    count = len(tokens) >> 2
    context = run.runtime.facts.context_length
    if seq.length + count > context:
        what = f"the sequence would have {seq.length + count:,} tokens"
        if not seq.length:
            what = f"the prompt has {count:,} tokens"
        raise Refused(ErrorCode.CONTEXT_FULL, f"{what}; the context is {context:,}")
    if count > run.tokens_left:
        limit = run.start.limits.tokens
        used = limit - run.tokens_left
        raise run.refuse_limit("tokens", limit, used, f"no room for {count:,} more tokens")
    run.tokens_left -= count
    if decoded is not None:
        keep = decoded.keep_logits
        params = _with_draw(seq, decoded)
    if seq.sampled < 0 or int.from_bytes(tokens[:4], "little") != seq.sampled:
        run.usage.prompt_tokens += count
    else:
        run.usage.prompt_tokens += count - 1
    seq.append(tokens)
    seq.logits = None
    seq.sampled = -1
    return params, keep


class Decoded(NamedTuple):
    """A checked ``realm_sampling``; ``params`` lacks its draw."""

    params: SamplingParams
    keep_logits: bool
    seed: int | None


def _with_draw(seq: GuestSequence, decoded: Decoded) -> SamplingParams:
    """The parameters of one draw. Each uses up one number of the sequence, greedy or not."""
    p = decoded.params
    if p.temperature == 0:
        seq.draws += 1
        return p
    uniform = seq.draw(decoded.seed)
    return SamplingParams(
        p.temperature,
        p.top_k,
        p.top_p,
        p.min_p,
        p.repetition_penalty,
        uniform,
        p.mask,
        p.bias_tokens,
        p.bias_values,
        p.logprob,
    )


def _decode_sampling(run: GuestRun, raw: tuple[Any, ...]) -> Decoded:
    """Check a ``realm_sampling`` and what it points to."""
    cached = run.sampling_cache
    if cached is not None and cached[0] == raw:
        result: Decoded = cached[1]
        return result
    temperature, top_p, min_p, penalty, top_k, flags, seed, mask_at, bias_at, mask_words, bias_count = raw
    # Comparisons are false for NaN, so each range refuses it too.
    _range("temperature", temperature, 0.0, 100.0)
    _range("top_p", top_p, 0.0, 1.0)
    _range("min_p", min_p, 0.0, 1.0)
    _range("repetition_penalty", penalty, 0.0, 100.0)
    if flags > LOGPROB | KEEP_LOGITS | SEED:
        raise Refused(ErrorCode.INVALID_ARGUMENT, f"sampling.flags is {flags:#x}: unknown bits")
    mask = bias_tokens = bias_values = None
    if mask_at:
        mask = _read_mask(run, mask_at, mask_words)
    elif mask_words:
        raise Refused(ErrorCode.INVALID_ARGUMENT, "sampling.mask_words is given without a mask")
    if bias_count:
        bias_tokens, bias_values = _read_bias(run, bias_at, bias_count)
    params = SamplingParams(
        temperature,
        top_k,
        top_p or 1.0,
        min_p,
        penalty or 1.0,
        0.0,
        mask,
        bias_tokens,
        bias_values,
        bool(flags & LOGPROB),
    )
    decoded = Decoded(params, bool(flags & KEEP_LOGITS), seed if flags & SEED else None)
    if not mask_at and not bias_count:
        # What lies behind pointers may change between calls; plain values do not.
        run.sampling_cache = (raw, decoded)
    return decoded


def _range(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise Refused(ErrorCode.INVALID_ARGUMENT, f"sampling.{name} is {value}; it must be {low:g}..{high:g}")


def _read_mask(run: GuestRun, pointer: int, words: int) -> bytes:
    facts = run.runtime.facts
    if words != facts.mask_words:
        raise Refused(ErrorCode.INVALID_ARGUMENT, f"sampling.mask_words is {words}; it must be {facts.mask_words}")
    try:
        mask = run.memory.read(pointer, words * 4)
    except OutOfBounds:
        raise Refused(ErrorCode.BAD_POINTER, "sampling.mask reaches outside the memory") from None
    if not int.from_bytes(mask, "little") & ((1 << facts.vocab_size) - 1):
        raise Refused(ErrorCode.INVALID_ARGUMENT, "sampling.mask allows no token")
    return mask


def _read_bias(run: GuestRun, pointer: int, count: int) -> tuple[bytes, bytes]:
    if count > MAX_BIAS:
        raise Refused(ErrorCode.INVALID_ARGUMENT, f"sampling.bias_count is {count}; it must be 0..{MAX_BIAS}")
    try:
        pairs = np.frombuffer(run.memory.read(pointer, count * 8), dtype=[("token", "<u4"), ("value", "<f4")])
    except OutOfBounds:
        raise Refused(ErrorCode.BAD_POINTER, "sampling.bias reaches outside the memory") from None
    if not np.isfinite(pairs["value"]).all():
        raise Refused(ErrorCode.INVALID_ARGUMENT, "sampling.bias has a value that is not finite")
    tokens = pairs["token"].tobytes()
    check_tokens(run, tokens, "sampling.bias")
    return tokens, pairs["value"].tobytes()


def _logits(seq: GuestSequence) -> bytes:
    if seq.logits is None:
        raise Refused(
            ErrorCode.NO_LOGITS, "the sequence has no logits: call forward without sampling, or with KEEP_LOGITS"
        )
    return seq.logits


def _logit_array(run: GuestRun, seq: GuestSequence) -> np.ndarray[Any, np.dtype[np.float32]]:
    logits = np.frombuffer(_logits(seq), dtype="<f4")
    run.charge(16 * len(logits))
    return logits


# --- answers --------------------------------------------------------------------------------------


def _settle_forward(run: GuestRun, seq: GuestSequence, tokens: bytes, result: EngineResult) -> tuple[int, float, int]:
    """Take an engine's answer in: (token or error code, log-probability, flags)."""
    if isinstance(result, ForwardDone):
        usage = run.usage
        usage.cached_tokens += result.cached
        if result.logits is not None:
            seq.logits = result.logits
        token = result.token
        if token < 0:
            return -1, result.logprob, 0
        seq.sampled = token
        usage.new_tokens += 1
        return token, result.logprob, TOKEN_EOS if token in run.runtime.facts.eos else 0
    # The engine appended nothing.
    seq.truncate(seq.length - (len(tokens) >> 2))
    run.tokens_left += len(tokens) >> 2
    return _failed(run, "forward", result), _NAN, 0


def _failed(run: GuestRun, name: str, result: EngineResult) -> int:
    if not isinstance(result, CallFailed):
        raise TypeError(f"the engine answered {name} with {type(result).__name__}")
    run.warn(f"{name}: {result.message}")
    return result.code if result.code < 0 else int(ErrorCode.INTERNAL)


def _forward_done(run: GuestRun, seq: GuestSequence, tokens: bytes, out: int, result: EngineResult) -> int:
    token, logprob, flags = _settle_forward(run, seq, tokens, result)
    if isinstance(result, CallFailed):
        return token
    if out:
        run.memory.pack(_TOKEN, out, token, logprob, seq.length, flags)
    return max(token, 0)


class _Batch:
    """The answers that one ``batch_forward`` still misses."""

    def __init__(self, run: GuestRun) -> None:
        self.run = run
        self.missing = 0
        self.succeeded = 0

    def done(self, seq: GuestSequence, tokens: bytes, at: int, result: EngineResult) -> int | None:
        token, logprob, flags = _settle_forward(self.run, seq, tokens, result)
        self.run.memory.pack(_ITEM_ANSWER, at, token, logprob, seq.length, flags)
        self.succeeded += not isinstance(result, CallFailed)
        self.missing -= 1
        return None if self.missing else self.succeeded


def _value_done(run: GuestRun, name: str, result: EngineResult) -> int:
    return result.value if isinstance(result, CallDone) else _failed(run, name, result)


def _opened(run: GuestRun, seq: GuestSequence, handle: int, result: EngineResult) -> int:
    if isinstance(result, CallDone):
        seq.length = seq.unknown = result.value
        return handle
    run.drop_sequence(seq)
    return _failed(run, "seq_open", result)
