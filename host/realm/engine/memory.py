"""How much memory there is, what an engine needs of it, and what to say when it is not enough."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Iterator
from pathlib import Path

import torch

from realm.engine.kv_cache import PAGE_SIZE
from realm.errors import RealmError
from realm.models.config import ModelConfig
from realm.models.loading import expected_shapes

log = logging.getLogger("realm.engine")

_WORDS = ("out of memory", "can't allocate memory")
"""What torch, CUDA and the CPU's allocator say; their types differ from release to release."""

CPU_PART = 4
"""A pool in main memory takes at most one part in as many of what is free ..."""
CPU_CONTEXTS = 8
"""... and at most as many full contexts: a computer has other things to do."""

ADAPTER_PART = 12
"""Adapters take one part in as many of what a GPU's weights leave ..."""
LEAST_ADAPTERS, MOST_ADAPTERS = 256 << 20, 8 << 30
"""... within these bounds, as far as there is room ..."""
FEWEST_ADAPTERS = 16 << 20
"""... and none at all where there is less than this: a few adapters of a small model."""


def page_bytes(config: ModelConfig, dtype: torch.dtype) -> int:
    """Bytes of one KV page over all layers."""
    return PAGE_SIZE * 2 * config.kv_heads * config.head_dim * config.layers * dtype.itemsize


def weight_bytes(config: ModelConfig, dtype: torch.dtype) -> int:
    """Bytes of all weights."""
    return sum(math.prod(shape) for shape in expected_shapes(config).values()) * dtype.itemsize


def available_memory() -> int:
    """Bytes of main memory that the kernel says a new process can take (Linux ``MemAvailable``)."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise RealmError("engine_start", "the free memory cannot be read; give --kv-pages")


def device_memory(device: torch.device) -> int:
    """Free bytes of a GPU's memory, as its driver counts; what torch keeps for later is given back before."""
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(device)
    return free


def cpu_pages(config: ModelConfig, dtype: torch.dtype, free: int) -> int:
    """KV pages where the operator has not said how many: see :data:`CPU_PART` and :data:`CPU_CONTEXTS`."""
    most = CPU_CONTEXTS * context_pages(config)
    return max(1, min(most, free // CPU_PART // page_bytes(config, dtype)))


def context_pages(config: ModelConfig) -> int:
    """KV pages of one full context."""
    return -(-config.context_length // PAGE_SIZE)


def cuda_pages(
    config: ModelConfig, dtype: torch.dtype, *, free: int, reserved: int, pages: int, fraction: float
) -> int:
    """KV pages on a GPU that has ``free`` bytes left once the weights are loaded.

    Args:
        reserved: bytes that steps and graphs take beside the pages. pages: what the operator chose, or 0.
        fraction: of what is left then that pages may take, where the operator did not choose.

    Raises:
        RealmError: ``engine_start`` if they do not fit: what is needed, what there is, what to lower.
    """
    each = page_bytes(config, dtype)
    # One page more than there are: rows that only fill up a graph write to it.
    left = free - reserved - each
    if pages:
        if pages * each > left:
            raise too_little(
                f"{pages:,} KV pages and the memory of steps",
                needed=free - left + pages * each,
                free=free,
                lower=f"give --kv-pages {max(left, 0) // each} or fewer, or lower --adapter-memory, --token-budget and "
                "--max-sequences",
            )
        return pages
    found = int(left * fraction) // each
    if found < 1:
        raise too_little(
            "one KV page and the memory of steps",
            needed=free - left + each,
            free=free,
            lower="lower --adapter-memory, --token-budget and --max-sequences, raise --kv-fraction",
        )
    return found


def adapter_memory(*, free: int, room: int) -> int:
    """Bytes for adapters on a GPU where the operator has not said how many; 0 where there is no room.

    Args:
        free: bytes that the weights leave. room: those that adapters may have of them at most.
    """
    wanted = min(MOST_ADAPTERS, max(LEAST_ADAPTERS, free // ADAPTER_PART))
    given = min(wanted, room)
    return given >> 20 << 20 if given >= FEWEST_ADAPTERS else 0


def warn_of_few(config: ModelConfig, pages: int) -> None:
    """Say so when a sequence that the model could take will not fit."""
    if pages < context_pages(config):
        log.warning(
            "%s KV pages hold %s tokens: sequences longer than that fail, though the model's context has %s; "
            "more --kv-pages need more memory",
            f"{pages:,}",
            f"{pages * PAGE_SIZE:,}",
            f"{config.context_length:,}",
        )


def too_little(what: str, *, needed: int, free: int, lower: str) -> RealmError:
    """``engine_start``: ``what`` needs more memory than there is. Sizes in bytes; ``lower`` says what helps."""
    message = f"{what} need {_size(needed)}, and {_size(free)} are free: {lower}"
    return RealmError("engine_start", message, details={"needed": needed, "free": free})


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether memory did not suffice, of the device or of the machine."""
    return any(words in str(error).lower() for words in _WORDS)


@contextlib.contextmanager
def explained(what: str, device: torch.device, *, needed: int, lower: str) -> Iterator[None]:
    """Turn a device's running out of memory into ``engine_start``; ``needed`` are bytes, an estimate."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        try:
            free = device_memory(device) if device.type == "cuda" else available_memory()
        except RuntimeError:
            free = 0  # not even asking is possible any more
        raise too_little(what, needed=needed, free=free, lower=lower) from error


def _size(count: int) -> str:
    return f"{count / 2**30:.2f} GiB"
