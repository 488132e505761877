"""Host functions on the model and on sequences: forward, adapters, fork, truncate, save."""

from __future__ import annotations

import math

from realm.guests.abi import CONSTANTS, ErrorCode
from realm.guests.decoding import LAYOUTS, Refused, Room
from realm.guests.deferral import COPY_FUEL
from realm.guests.fiber_types import OutOfBounds
from realm.guests.run import Completion, GuestRun
from realm.guests.sampling_arguments import Decoded, check_tokens, decode_sampling, with_draw
from realm.guests.sequences import GuestSequence
from realm.messages import (
    CONTINUE,
    NO_LANE,
    ApplyAdapter,
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

TOKEN_EOS = CONSTANTS["TOKEN_EOS"][0]
MAX_DRAFT = 4096
KEPT_LOGITS = 8
"""So many sequences of a run may keep their logits, however little memory it may have."""

_TOKEN = LAYOUTS["realm_token"]
_SAMPLING = LAYOUTS["realm_sampling"]
_SPECULATION = LAYOUTS["realm_speculation"]
_NAN = math.nan


class ModelCalls:
    """Groups model and sequences of the table."""

    # --- forward ----------------------------------------------------------------------------------

    def forward(self, run: GuestRun, seq: GuestSequence, tokens: bytes, sampling: bytes | None, out: int) -> int | None:
        answer = seq.answer
        if answer is None:
            answer = seq.answer = ForwardAnswer(run, seq)
        if goes_on(seq, tokens, sampling):
            token, lane = seq.sampled, go_on(run, seq, tokens)
            answer.out, answer.count = out, 1
            runtime = run.runtime
            runtime.continues += CONTINUE.pack(runtime.new_call(run, answer), seq.id, lane, token)
            return None
        check_tokens(run, tokens, "tokens")
        decoded = None if sampling is None else decode_sampling(run, sampling)
        check_room(run, seq, len(tokens) >> 2)
        if decoded is None or decoded.keep_logits:
            check_kept(run, seq, 0)
        params, keep = commit(run, seq, tokens, decoded)
        answer.out, answer.count = out, len(tokens) >> 2
        run.op(Forward(run.call(answer), seq.id, tokens, params, keep))
        return None

    def lora_apply(self, run: GuestRun, seq: GuestSequence, name: str) -> None:
        # Whatever comes of it, its next forward is a message.
        seq.lane = -1
        run.op(ApplyAdapter(run.call(_Applied(run, seq)), seq.id, name))

    def speculative_step(self, run: GuestRun, seq: GuestSequence, params: bytes, out: Room) -> int:
        source, _length, tokens_at, count, flags, sampling_at, *_ = _SPECULATION.unpack(params)
        if source > 2 or flags:
            raise Refused(ErrorCode.INVALID_ARGUMENT, f"params: source {source}, flags {flags}")
        if count > MAX_DRAFT:
            raise Refused(ErrorCode.INVALID_ARGUMENT, f"params.count is {count}")
        run.charge(COPY_FUEL * 4 * count)
        try:
            check_tokens(run, run.memory.read(tokens_at, count * 4), "params.tokens")
            if sampling_at:
                decode_sampling(run, run.memory.read(sampling_at, _SAMPLING.size))
        except OutOfBounds:
            raise Refused(ErrorCode.BAD_POINTER, "params: tokens or sampling reach outside the memory") from None
        raise Refused(ErrorCode.NOT_SUPPORTED, "this engine does not speculate for guests")

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
        # At the worst all that stays is copied, from what it shares with forks.
        run.charge(COPY_FUEL * length)
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
        seq.lane = -1
        call = run.call(_Saved(run))
        run.op(SaveSequence(call, seq.id, name))

    def seq_open(self, run: GuestRun, name: str) -> None:
        seq = run.new_sequence()
        handle = run.add_sequence(seq)
        call = run.call(_Opened(run, seq, handle))
        run.op(OpenSaved(call, seq.id, run.start.tenant, run.start.run, name))


# --- checks ---------------------------------------------------------------------------------------


def check_room(run: GuestRun, seq: GuestSequence, count: int) -> None:
    """Raise Refused unless the sequence and the run may have so many more tokens."""
    context = run.runtime.facts.context_length
    if seq.length + count > context:
        what = f"the sequence would have {seq.length + count:,} tokens"
        if not seq.length:
            what = f"the prompt has {count:,} tokens"
        raise Refused(ErrorCode.CONTEXT_FULL, f"{what}; the context is {context:,}")
    if count > run.tokens_left:
        limit = run.start.limits.tokens
        used = limit - run.tokens_left
        raise run.refuse_limit("tokens_per_run", limit, used, f"no room for {count:,} more tokens")


def check_kept(run: GuestRun, seq: GuestSequence, coming: int) -> None:
    """Raise Refused if the sequence cannot keep its logits: a run's kept ones count like its memory.

    ``coming`` is how many the run waits for already. Forks share what they keep.
    """
    size = 4 * run.runtime.facts.vocab_size
    limit = max(run.start.limits.memory_bytes, KEPT_LOGITS * size)
    if (len(run.sequences) + coming) * size <= limit:
        return
    kept = len({id(s.logits) for s in run.sequences.values() if s.logits is not None and s is not seq}) + coming
    if (kept + 1) * size > limit:
        raise run.refuse_limit("memory_bytes", limit, kept * size, "no room to keep more logits")


def commit(
    run: GuestRun, seq: GuestSequence, tokens: bytes, decoded: Decoded | None
) -> tuple[SamplingParams | None, bool]:
    """Account for the tokens of a checked forward that is a message; its sampling, and whether to keep logits."""
    params: SamplingParams | None = None
    keep = True
    count = len(tokens) >> 2
    run.tokens_left -= count
    if decoded is not None:
        keep = decoded.keep_logits
        params = with_draw(seq, decoded)
    if seq.sampled < 0 or int.from_bytes(tokens[:4], "little") != seq.sampled:
        run.usage.prompt_tokens += count
    else:
        run.usage.prompt_tokens += count - 1
    seq.append(tokens)
    seq.logits = None
    seq.sampled = seq.lane = -1
    seq.going = None if decoded is None or keep else decoded.raw
    return params, keep


def goes_on(seq: GuestSequence, tokens: bytes, sampling: bytes | None) -> bool:
    """Whether a forward repeats the sequence's last one with the token that it drew: a row tells the engine."""
    return (
        seq.lane >= 0 and sampling == seq.going and len(tokens) == 4 and int.from_bytes(tokens, "little") == seq.sampled
    )


def go_on(run: GuestRun, seq: GuestSequence, tokens: bytes) -> int:
    """Check and account for such a forward; the lane to name. The engine drew the token, so it is a known one.

    Raises:
        Refused: there is no room for it.
    """
    lane = seq.lane
    if seq.length >= run.runtime.facts.context_length or run.tokens_left < 1:
        check_room(run, seq, 1)
    run.tokens_left -= 1
    seq.draws += 1
    seq.append(tokens)
    seq.sampled = seq.lane = -1
    return lane


# --- answers --------------------------------------------------------------------------------------


def settle_drawn(run: GuestRun, seq: GuestSequence, token: int, cached: int, lane: int) -> int:
    """Take a drawn token in; its flags. ``lane`` is the engine's word for going on, or -1."""
    usage = run.usage
    usage.cached_tokens += cached
    usage.new_tokens += 1
    seq.sampled = token
    if lane != NO_LANE and seq.going is not None:
        seq.lane = lane
    return TOKEN_EOS if token in run.runtime.facts.eos else 0


def settle_forward(run: GuestRun, seq: GuestSequence, count: int, result: EngineResult) -> tuple[int, float, int]:
    """Take a message in that answers a forward of ``count`` tokens: (token or error code, log-probability, flags)."""
    if isinstance(result, ForwardDone):
        if result.logits is not None:
            seq.logits = result.logits
        if result.token < 0:
            run.usage.cached_tokens += result.cached
            return -1, result.logprob, 0
        return result.token, result.logprob, settle_drawn(run, seq, result.token, result.cached, NO_LANE)
    # The engine appended nothing.
    seq.truncate(seq.length - count)
    run.tokens_left += count
    return _failed(run, "forward", result), _NAN, 0


def _failed(run: GuestRun, name: str, result: EngineResult) -> int:
    if not isinstance(result, CallFailed):
        raise TypeError(f"the engine answered {name} with {type(result).__name__}")
    run.warn(f"{name}: {result.message}")
    if result.limit is not None:
        run.limit = result.limit
    return result.code if result.code < 0 else int(ErrorCode.INTERNAL)


class ForwardAnswer(Completion):
    """Answers the forwards of one sequence, which has at most one out: of ``count`` tokens, written to ``out``."""

    __slots__ = ("_run", "_seq", "count", "out")

    def __init__(self, run: GuestRun, seq: GuestSequence) -> None:
        self._run = run
        self._seq = seq
        self.count = self.out = 0

    def done(self, result: EngineResult) -> int:
        run, seq = self._run, self._seq
        token, logprob, flags = settle_forward(run, seq, self.count, result)
        if isinstance(result, CallFailed):
            return token
        if self.out:
            run.memory.pack(_TOKEN, self.out, token, logprob, seq.length, flags)
        return max(token, 0)

    def drawn(self, token: int, logprob: float, cached: int, lane: int) -> int:
        run, seq = self._run, self._seq
        flags = settle_drawn(run, seq, token, cached, lane)
        if self.out:
            run.memory.pack(_TOKEN, self.out, token, logprob, seq.length, flags)
        return token


class _Applied(Completion):
    __slots__ = ("_run", "_seq")

    def __init__(self, run: GuestRun, seq: GuestSequence) -> None:
        self._run, self._seq = run, seq

    def done(self, result: EngineResult) -> int:
        if not isinstance(result, CallDone):
            return _failed(self._run, "lora_apply", result)
        self._seq.change_model()
        return 0


class _Saved(Completion):
    __slots__ = ("_run",)

    def __init__(self, run: GuestRun) -> None:
        self._run = run

    def done(self, result: EngineResult) -> int:
        return result.value if isinstance(result, CallDone) else _failed(self._run, "seq_save", result)


class _Opened(Completion):
    __slots__ = ("_handle", "_run", "_seq")

    def __init__(self, run: GuestRun, seq: GuestSequence, handle: int) -> None:
        self._run, self._seq, self._handle = run, seq, handle

    def done(self, result: EngineResult) -> int:
        seq = self._seq
        if isinstance(result, CallDone):
            seq.length = seq.unknown = result.value
            return self._handle
        self._run.drop_sequence(seq)
        return _failed(self._run, "seq_open", result)
