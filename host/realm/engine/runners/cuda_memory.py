"""How much memory a CUDA runner takes besides weights and KV pages."""

from __future__ import annotations

import torch

from realm.engine.kernels.lora import FEW, FEW_TOKENS, MANY, workspace_size
from realm.engine.kernels.lora_plan import GROUP_TARGETS, most_words
from realm.engine.kernels.sampling import DeviceSampler
from realm.engine.kv_cache import PAGE_SIZE
from realm.engine.runners.cuda_adapters import PIECE, SLOTS, adapter_slack
from realm.engine.runners.cuda_buckets import COMMON, bucket_sizes, chunk_rooms, most_rows
from realm.models.config import ModelConfig

MOST_PARTS = 4096
"""Decoding rows times the parts of their contexts; bounds the memory in which the parts meet."""

MOST_CHUNK_GRAPHS = 32
"""Graphs of steps with chunks that are kept beside those of the start; kinds that come later do without."""

MOST_RARE_GRAPHS = 128
"""Graphs of decode steps that are kept beside those of the start; the same then."""

MOST_ADAPTER_GRAPHS = 32
"""Graphs of steps with adapters that are kept beside those of the start, of each kind of step; the same then."""

LIBRARIES = 192 << 20
"""Workspaces of cuBLAS, and the code of its kernels and of ours."""

GRAPH_BYTES_PER_LAYER = 64 << 10
"""What the driver keeps of a captured graph: some KiB for each of a layer's kernels."""


def plan_words(token_budget: int, rows: int) -> int:
    """Numbers of the plan of adapters of any such step (:mod:`realm.engine.kernels.lora_plan`)."""
    # Chunks that draw nothing are no output rows.
    few = most_words(FEW_TOKENS + rows, 2 * rows, tile=FEW, block=FEW)
    return max(few, most_words(most_rows(token_budget, rows), 2 * rows, tile=MANY, block=MANY))


def block_bytes(config: ModelConfig, token_budget: int, rows: int, *, adapters: bool = False) -> int:
    """Bytes that hold the inputs of any step of up to ``rows`` output rows and ``token_budget`` tokens of chunks.

    An input token takes up to 32 bytes and may be filled up to twice as many; an output row takes 48 with its
    draw, its mask and its page table besides. Tiles of attention take 8 bytes and have 16 rows at least.
    """
    group = config.heads // config.kv_heads
    table = 4 * -(-config.context_length // PAGE_SIZE)
    mask = 4 * -(-config.vocab_size // 32)
    plan = 4 * plan_words(token_budget, rows) if adapters else 0
    return (token_budget + rows) * (64 + group) + rows * (128 + 2 * table + mask) + (1 << 16) + plan


def activation_bytes(config: ModelConfig, dtype: torch.dtype, token_budget: int, lanes: int) -> int:
    """An upper estimate, in bytes, of all that a runner allocates on its device besides weights and KV pages.

    The arguments are those of :class:`realm.engine.runners.cuda.CudaRunner`.
    """
    rows = max(1, lanes // 2)
    heads = config.heads * config.head_dim
    qkv = heads + 2 * config.kv_heads * config.head_dim
    # What is between the weights: the residual stream, its norm, a block's result, and the gated pair.
    between = 2 * config.hidden_size + heads + max(qkv, 2 * config.intermediate_size) + config.intermediate_size
    chunks = most_rows(token_budget, rows) * (between * dtype.itemsize + 4 * config.hidden_size)
    # Hidden states of output rows, in the graphs' pool and for steps without one.
    captured = 2 * 4 * rows * config.hidden_size * 4
    logits = rows * config.vocab_size * (dtype.itemsize + 4)
    parts = max(MOST_PARTS, rows) * config.heads * (config.head_dim + 2) * 4
    count = MOST_CHUNK_GRAPHS + MOST_RARE_GRAPHS + len(bucket_sizes(rows)) * len(COMMON)
    count += len(chunk_rooms(token_budget, rows))
    graphs = count * config.layers * GRAPH_BYTES_PER_LAYER
    static = block_bytes(config, token_budget, rows) + rows * (
        2 * 4 * -(-config.context_length // PAGE_SIZE) + 4 * -(-config.vocab_size // 32)
    )
    sampler = DeviceSampler.bytes_needed(config.vocab_size, rows)
    return chunks + captured + logits + parts + graphs + static + sampler + LIBRARIES


def adapter_bytes(config: ModelConfig, dtype: torch.dtype, token_budget: int, lanes: int) -> int:
    """The same of what a runner allocates where it has memory for adapters, besides that memory itself."""
    rows = max(1, lanes // 2)
    tables = SLOTS * config.layers * len(GROUP_TARGETS) * 20
    parts = workspace_size(most_rows(token_budget, rows)) * 4
    # Of decode steps and of those with chunks, and each for two families of products.
    count = 2 * (len(bucket_sizes(rows)) + len(chunk_rooms(token_budget, rows, adapted=True)) + MOST_ADAPTER_GRAPHS)
    graphs = 2 * count * config.layers * GRAPH_BYTES_PER_LAYER
    # Hidden states of output rows, of steps of one row as of all others.
    captured = 4 * rows * config.hidden_size * 4
    plans = 2 * 4 * plan_words(token_budget, rows)
    return adapter_slack(config) * dtype.itemsize + tables + parts + graphs + captured + plans + 2 * PIECE
