"""Paged attention cases at random, and what the kernels should make of them, in float64."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from realm.engine.kernels.attention_prefill import attention_prefill, most_tiles, prefill_tile, prefill_tiles
from realm.engine.kernels.rotary import rope_and_store

PAGE = 16
WILD = 1 << 30
"""A page number in the unused rest of tables: whoever reads there faults, or gets NaN."""


@dataclass(frozen=True)
class Shape:
    heads: int
    kv_heads: int
    dim: int

    @property
    def width(self) -> int:
        return (self.heads + 2 * self.kv_heads) * self.dim


@dataclass(frozen=True)
class Case:
    """Sequences with ``contexts[i]`` tokens in the cache and ``counts[i]`` new rows in ``qkv`` (not rotated).

    The cache is NaN where no token has been written. ``cos`` and ``sin`` have head_dim columns.
    """

    shape: Shape
    contexts: list[int]
    counts: list[int]
    qkv: Tensor
    cache: Tensor
    tables: Tensor
    cos: Tensor
    sin: Tensor

    @property
    def positions(self) -> list[int]:
        return [
            context + row for context, count in zip(self.contexts, self.counts, strict=True) for row in range(count)
        ]

    @property
    def slots(self) -> list[int]:
        """Where each row's key and value belong: page * PAGE + offset."""
        pages = self.tables.tolist()
        return [
            pages[index][position // PAGE] * PAGE + position % PAGE
            for index, (context, count) in enumerate(zip(self.contexts, self.counts, strict=True))
            for position in range(context, context + count)
        ]

    def ints(self, values: list[int], dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=self.qkv.device)


def make_case(
    shape: Shape,
    contexts: list[int],
    counts: list[int],
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seed: int = 0,
    spare: int = 3,
) -> Case:
    """Pages lie in random order; each sequence has exactly as many as it needs."""
    source = torch.Generator(device).manual_seed(seed)
    ends = [context + count for context, count in zip(contexts, counts, strict=True)]
    used = [-(-end // PAGE) for end in ends]
    pages = sum(used) + spare
    order = torch.randperm(pages, generator=source, device=device).int()
    tables = torch.full((len(used), max(1, *used)), WILD, dtype=torch.int32, device=device)
    cache = torch.full((2, pages, shape.kv_heads, PAGE, shape.dim), float("nan"), dtype=dtype, device=device)
    taken = 0
    for row, (context, count) in enumerate(zip(contexts, used, strict=True)):
        tables[row, :count] = order[taken : taken + count]
        taken += count
        if context:
            token = torch.arange(context, device=device)
            known = torch.randn(2, context, shape.kv_heads, shape.dim, generator=source, device=device)
            page = tables[row].long()[token // PAGE]
            cache[:, page, :, token % PAGE] = known.transpose(0, 1).to(dtype)
    # Queries large enough that attention is not all but uniform.
    qkv = torch.randn(sum(counts), shape.width, generator=source, device=device)
    qkv[:, : shape.heads * shape.dim] *= 2
    angles = torch.outer(
        torch.arange(max(1, *ends), device=device),
        10000.0 ** -(torch.arange(0, shape.dim, 2, device=device) / shape.dim),
    )
    both = torch.cat((angles, angles), dim=-1)
    return Case(shape, contexts, counts, qkv.to(dtype), cache, tables, both.cos().to(dtype), both.sin().to(dtype))


def rotated(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """Queries [n, heads, dim], keys [n, kv_heads, dim] after rotation, and values: float64, rounded as kept."""
    shape, dtype = case.shape, case.qkv.dtype
    rows = case.qkv.double().view(-1, shape.heads + 2 * shape.kv_heads, shape.dim)
    turned, values = rows[:, : shape.heads + shape.kv_heads], rows[:, shape.heads + shape.kv_heads :]
    at = case.ints(case.positions, torch.int64)
    cos, sin = case.cos.double()[at].unsqueeze(1), case.sin.double()[at].unsqueeze(1)
    half = shape.dim // 2
    turned = turned * cos + torch.cat((-turned[..., half:], turned[..., :half]), dim=-1) * sin
    turned = turned.to(dtype).double()
    return turned[:, : shape.heads], turned[:, shape.heads :], values


def stored(case: Case) -> Tensor:
    """The cache after the rows' keys and values were written."""
    _, keys, values = rotated(case)
    cache = case.cache.clone()
    slots = case.ints(case.slots, torch.int64)
    cache[0, slots // PAGE, :, slots % PAGE] = keys.to(cache.dtype)
    cache[1, slots // PAGE, :, slots % PAGE] = values.to(cache.dtype)
    return cache


def attended(case: Case) -> Tensor:
    """Causal attention of every row: [n, heads * dim], float64."""
    shape = case.shape
    cache = stored(case)
    queries, _, _ = rotated(case)
    parts, first = [], 0
    for row, (context, count) in enumerate(zip(case.contexts, case.counts, strict=True)):
        token = torch.arange(context + count, device=cache.device)
        kv = cache[:, case.tables[row].long()[token // PAGE], :, token % PAGE].double()
        # Advanced indices around a slice come first: [tokens, 2, kv_heads, dim].
        keys, values = kv.repeat_interleave(shape.heads // shape.kv_heads, dim=2).unbind(1)
        scores = torch.einsum("qhd,thd->hqt", queries[first : first + count], keys) * shape.dim**-0.5
        hidden = token[None, :] > torch.arange(context, context + count, device=cache.device)[:, None]
        weights = torch.softmax(scores.masked_fill(hidden, float("-inf")), dim=-1)
        parts.append(torch.einsum("hqt,thd->qhd", weights, values).flatten(1))
        first += count
    return torch.cat(parts)


@dataclass(frozen=True)
class Linear:
    """A call of ``skinny_linear`` at random; ``out`` is filled in by it."""

    x: Tensor
    weight: Tensor
    out: Tensor
    bias: Tensor | None
    gain: Tensor | None
    gated: bool
    add: bool

    EPS = 1e-5

    def expected(self) -> Tensor:
        """In float64, of ``out`` as it is now."""
        x = self.x.double()
        if self.gain is not None:
            x = x / (x.square().mean(-1, keepdim=True) + self.EPS).sqrt() * self.gain.double()
        result = x @ self.weight.double().T
        if self.bias is not None:
            result = result + self.bias.double()
        if self.gated:
            gate, up = result.chunk(2, dim=-1)
            result = gate * torch.sigmoid(gate) * up
        return result + self.out.double() if self.add else result


def make_linear(
    rows: int,
    inner: int,
    width: int,
    *,
    bias: bool,
    gain: bool,
    gated: bool,
    add: bool,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> Linear:
    """Results are about one in size. ``out`` is NaN unless it is added to."""
    source = torch.Generator(device).manual_seed(rows + inner + width)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=source, device=device)

    lines = 2 * width if gated else width
    x = random(rows, inner)
    out = random(rows, width) if add else torch.full((rows, width), float("nan"), device=device)
    return Linear(
        # Far from norm one, so that a missing norm shows.
        (5 * x if gain else x).to(dtype),
        (random(lines, inner) * inner**-0.5).to(dtype),
        out.to(dtype),
        random(lines).to(dtype) if bias else None,
        random(inner).to(dtype) if gain else None,
        gated,
        add,
    )


def prefill(case: Case, longest: int) -> torch.Tensor:
    """Store the case's keys and values, and attend with tiles for chunks of up to ``longest`` tokens.

    Some of the tiles are none, as in a step that is filled up.
    """
    shape = case.shape
    slots, positions = case.ints(case.slots, torch.int64), case.ints(case.positions)
    rope_and_store(case.qkv, case.cos, case.sin, positions, slots, case.cache)
    starts = [sum(case.counts[:index]) for index in range(len(case.counts) + 1)]
    group = shape.heads // shape.kv_heads
    tile = prefill_tile(longest, group, shape.dim, case.qkv.dtype)
    tiles = prefill_tiles(np.array(case.counts), np.array(case.contexts), group, tile)
    filled = np.full((most_tiles(sum(case.counts), len(case.counts), group, tile), 2), -1, np.int32)
    filled[: len(tiles)] = tiles
    out = case.qkv.new_full((len(case.qkv), shape.heads * shape.dim), float("nan"))
    attention_prefill(
        case.qkv,
        case.cache,
        case.tables,
        case.ints(starts),
        case.ints(case.contexts),
        torch.from_numpy(filled).to(out.device),
        out,
        tile=tile,
    )
    return out
