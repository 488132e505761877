"""Host functions on kept logits: read, the best, draw, score."""

from __future__ import annotations

from functools import partial

import numpy as np
import numpy.typing as npt

from realm.guests.abi import CONSTANTS, ErrorCode
from realm.guests.decoding import LAYOUTS, Refused, Room
from realm.guests.run import GuestRun
from realm.guests.sampling_arguments import check_tokens, decode_sampling, with_draw
from realm.guests.sampling_reference import draw_token, log_probabilities, most_likely
from realm.guests.sequences import GuestSequence
from realm.messages import SamplingParams

TOKEN_EOS = CONSTANTS["TOKEN_EOS"][0]
_TOKEN = LAYOUTS["realm_token"]

# Measured on 49,152 and 152,000 logits; a nanosecond is worth about 4 units of fuel.
_PASS_FUEL = 16
"""Fuel an entry that is looked at a few times (2 to 4 ns)."""
_SORT_FUEL = 400
"""Fuel an entry that is sorted (80 to 100 ns)."""
_SCORE_FUEL = 40
"""Fuel a token whose logit is looked up (9 ns)."""

Logits = npt.NDArray[np.float32]


class LogitsCalls:
    """Group logits of the table. Everything but a copy is done off the guest's stack."""

    def logits_read(self, run: GuestRun, seq: GuestSequence, out: Room) -> int:
        data = _logits(seq)
        run.charge(len(data))
        count = len(data) >> 2
        if count <= out.capacity:
            run.memory.write(out.pointer, data)
        return count

    def logits_topk(self, run: GuestRun, seq: GuestSequence, out: Room) -> None:
        logits = np.frombuffer(_logits(seq), dtype="<f4")
        fuel = _PASS_FUEL * len(logits) + _SORT_FUEL * min(out.capacity, len(logits))
        run.work(fuel, partial(_most_likely, logits, out.capacity), partial(_write_candidates, run, out))

    def sample(self, run: GuestRun, seq: GuestSequence, sampling: bytes, out: int) -> None:
        logits = np.frombuffer(_logits(seq), dtype="<f4")
        decoded = decode_sampling(run, sampling)
        penalty = decoded.params.repetition_penalty
        if penalty != 1.0 and seq.unknown:
            raise Refused(
                ErrorCode.NOT_SUPPORTED,
                "repetition_penalty needs the tokens of a sequence that was opened by name; let forward sample",
            )
        history = np.frombuffer(seq.tokens(), dtype="<u4") if penalty != 1.0 else np.empty(0, dtype="<u4")
        greedy = decoded.params.temperature == 0
        fuel = _PASS_FUEL * len(logits) + (0 if greedy else _SORT_FUEL * len(logits)) + _SORT_FUEL * len(history)
        params = with_draw(seq, decoded)
        run.work(fuel, partial(_draw, logits, params, history), partial(_write_draw, run, seq, out))

    def score(self, run: GuestRun, seq: GuestSequence, tokens: bytes, out: Room) -> int | None:
        logits = np.frombuffer(_logits(seq), dtype="<f4")
        check_tokens(run, tokens, "tokens")
        count = len(tokens) >> 2
        if count > out.capacity:
            return count
        fuel = _PASS_FUEL * len(logits) + _SCORE_FUEL * count
        run.work(fuel, partial(_scores, logits, tokens), partial(_write_scores, run, out))
        return None


def _logits(seq: GuestSequence) -> bytes:
    if seq.logits is None:
        raise Refused(
            ErrorCode.NO_LOGITS, "the sequence has no logits: call forward without sampling, or with KEEP_LOGITS"
        )
    return seq.logits


def _most_likely(logits: Logits, count: int) -> bytes:
    tokens, logprobs = most_likely(logits, count)
    pairs = np.empty(len(tokens), dtype=[("token", "<u4"), ("logprob", "<f4")])
    pairs["token"], pairs["logprob"] = tokens, logprobs
    return pairs.tobytes()


def _write_candidates(run: GuestRun, out: Room, pairs: bytes) -> int:
    run.memory.write(out.pointer, pairs)
    return len(pairs) >> 3


def _draw(logits: Logits, params: SamplingParams, history: npt.NDArray[np.uint32]) -> tuple[int, float]:
    try:
        return draw_token(logits, params, history)
    except ValueError as error:
        raise Refused(ErrorCode.INVALID_ARGUMENT, f"sampling: {error}") from None


def _write_draw(run: GuestRun, seq: GuestSequence, out: int, drawn: tuple[int, float]) -> int:
    token, logprob = drawn
    seq.sampled = token
    run.usage.new_tokens += 1
    if out:
        eos = TOKEN_EOS if token in run.runtime.facts.eos else 0
        run.memory.pack(_TOKEN, out, token, logprob, seq.length, eos)
    return token


def _scores(logits: Logits, tokens: bytes) -> bytes:
    return log_probabilities(logits, np.frombuffer(tokens, dtype="<u4")).astype("<f4").tobytes()


def _write_scores(run: GuestRun, out: Room, values: bytes) -> int:
    run.memory.write(out.pointer, values)
    return len(values) >> 2
