"""What a worker may ask of one draw: every value that reaches the sampler is checked here.

Workers check what guests give them; this is the second check, because a worker is the process that runs
tenants' code. What passes draws a token and raises nothing (:mod:`realm.engine.sampling`).
"""

from __future__ import annotations

import numpy as np

from realm.messages import SamplingParams

MAX_TEMPERATURE = 100.0
MAX_PENALTY = 100.0
MAX_TOP_K = (1 << 32) - 1
MAX_NUMBER = 1 << 62
"""Numbers of draws are below this; those that follow fit in 64 bits then."""
MAX_BIAS = 4096
"""Entries of a bias."""


def sampling_fault(p: SamplingParams, vocab: int) -> str | None:
    """What is wrong with the parameters; None when they are good."""
    # Written so that NaN, which compares as false, is refused.
    if not 0 <= p.temperature <= MAX_TEMPERATURE:
        return f"temperature is {p.temperature}; it must be 0..{MAX_TEMPERATURE:g}"
    if not (0 <= p.key < 1 << 64 and -1 <= p.number < MAX_NUMBER):
        return f"draw {p.number} of stream {p.key} is out of range"
    if not 0 <= p.uniform < 1:
        return f"uniform is {p.uniform}; it must be in [0, 1)"
    if not 0 <= p.top_k <= MAX_TOP_K:
        return f"top_k is {p.top_k}; it must be 0..{MAX_TOP_K}"
    if not 0 < p.top_p <= 1:
        return f"top_p is {p.top_p}; it must be in (0, 1]"
    if not 0 <= p.min_p <= 1:
        return f"min_p is {p.min_p}; it must be 0..1"
    if not 0 < p.repetition_penalty <= MAX_PENALTY:
        return f"repetition_penalty is {p.repetition_penalty}; it must be in (0, {MAX_PENALTY:g}]"
    if p.mask is not None and (fault := _mask_fault(p.mask, vocab)) is not None:
        return fault
    if p.bias_tokens is not None or p.bias_values is not None:
        return _bias_fault(p.bias_tokens or b"", p.bias_values or b"", vocab)
    return None


def _mask_fault(mask: bytes, vocab: int) -> str | None:
    # Whole 64-bit words are as much as anybody pads to; more would only be kept in memory.
    least, most = -(-vocab // 8), -(-vocab // 64) * 8
    if not least <= len(mask) <= most:
        return f"the mask has {len(mask)} bytes; it must have {least}..{most}"
    if int.from_bytes(mask, "little") & ((1 << vocab) - 1) == 0:
        return "the mask allows no token"
    return None


def _bias_fault(tokens: bytes, values: bytes, vocab: int) -> str | None:
    count = len(tokens) // 4
    if len(tokens) % 4 or len(tokens) != len(values):
        return f"the bias has {len(tokens)} bytes of tokens and {len(values)} of values"
    if not 0 < count <= MAX_BIAS:
        return f"the bias has {count} entries; it must have 1..{MAX_BIAS}"
    if int(np.frombuffer(tokens, dtype="<u4").max()) >= vocab:
        return f"the bias names a token that is not below the vocabulary's size {vocab}"
    if not np.isfinite(np.frombuffer(values, dtype="<f4")).all():
        return "the bias has a value that is not finite"
    return None
