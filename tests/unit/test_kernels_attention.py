"""The attention kernels against float64, through Triton's interpreter. On a GPU: tests/gpu/test_kernels.py."""

from __future__ import annotations

import pytest
import torch

import tests.interpreter  # noqa: F401
from realm.engine.kernels.attention_decode import DecodeWorkspace, attention_decode, decode_splits
from realm.engine.kernels.rotary import rope_and_store
from tests.kernel_cases import Case, Shape, attended, make_case, prefill, rotated, stored

CPU = torch.device("cpu")
SHAPES = [Shape(2, 2, 16), Shape(6, 2, 8), Shape(4, 1, 64), Shape(8, 1, 32), Shape(3, 1, 48), Shape(20, 1, 16)]


def decode(case: Case, splits: int, workspace: DecodeWorkspace | None = None) -> torch.Tensor:
    """Attend with the case's rows; a sequence without one is a padding row of NaN, which must not be used."""
    rows = torch.full((len(case.counts), case.shape.width), float("nan"))
    present = torch.tensor(case.counts) > 0
    rows[present] = case.qkv
    lengths = [context + 1 if count else 0 for context, count in zip(case.contexts, case.counts, strict=True)]
    out = torch.full((len(rows), case.shape.heads * case.shape.dim), float("nan"))
    if workspace is None:
        workspace = DecodeWorkspace.allocate(len(rows) * splits, len(rows), case.shape.heads, case.shape.dim, CPU)
    before = rows.clone()
    attention_decode(
        rows, case.cos, case.sin, case.cache, case.tables, case.ints(lengths), out, workspace, splits=splits
    )
    torch.testing.assert_close(rows, before, rtol=0, atol=0, equal_nan=True)
    assert not out[~present].any(), "padding rows are zero"
    assert not workspace.arrived.any(), "ready for the next launch"
    return out[present]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("splits", [1, 4])
def test_decode_is_attention_over_all_tokens_up_to_its_own(shape: Shape, splits: int) -> None:
    contexts = [0, 15, 16, 0, 63, 64, 65, 200]
    case = make_case(shape, contexts, [1, 1, 1, 0, 1, 1, 1, 1], seed=splits)
    expected, cache = attended(case), stored(case)
    out = decode(case, splits)
    torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(case.cache, cache, rtol=1e-5, atol=1e-5, equal_nan=True)


def test_decode_takes_angles_of_half_a_head() -> None:
    case = make_case(Shape(6, 2, 8), [3, 40], [1, 1])
    expected = attended(case)
    half = Case(**{**case.__dict__, "cos": case.cos[:, :4].contiguous(), "sin": case.sin[:, :4].contiguous()})
    torch.testing.assert_close(decode(half, 1).double(), expected, rtol=1e-4, atol=1e-5)


def test_decode_parts_meet_whatever_the_workspace_held() -> None:
    case = make_case(Shape(6, 2, 8), [255, 100, 7], [1, 1, 1])
    expected = attended(case)
    workspace = DecodeWorkspace.allocate(3 * 8, 3, 6, 8, CPU)
    for garbage in (float("nan"), float("inf"), 0.0):
        workspace.partial.fill_(garbage)
        workspace.weights.fill_(garbage)
        for splits in (8, 2):
            out = decode(case, splits, workspace)
            torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-5)


def test_splits_fill_the_device_and_no_more() -> None:
    assert decode_splits(256, 8, 256, 132) == 1, "rows enough"
    assert decode_splits(1, 8, 192, 132) == 4, "parts of 64 tokens at least"
    assert decode_splits(1, 8, 1, 132) == 1
    assert decode_splits(1, 8, 32768, 132) == 64
    assert decode_splits(256, 8, 32768, 132) == 8, "one long row must not keep the others waiting"
    for rows in (1, 3, 64, 300):
        for longest in (1, 100, 5000, 131072):
            splits = decode_splits(rows, 3, longest, 132)
            assert splits & (splits - 1) == 0
            assert 1 <= splits <= 64


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    ("contexts", "counts"),
    [
        ([0, 5, 0, 16], [1, 2, 0, 3]),
        ([0, 15, 100], [33, 17, 1]),
        ([47], [81]),
    ],
    ids=str,
)
def test_prefill_is_causal_attention_of_each_chunk(shape: Shape, contexts: list[int], counts: list[int]) -> None:
    case = make_case(shape, contexts, counts, seed=sum(counts))
    expected, cache = attended(case), stored(case)
    torch.testing.assert_close(prefill(case, max(counts)).double(), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(case.cache, cache, rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("half", [False, True])
def test_rope_turns_queries_in_place_and_stores_the_rest(shape: Shape, half: bool) -> None:
    case = make_case(shape, [0, 30], [5, 4])
    queries, _, _ = rotated(case)
    cache, before = stored(case), case.qkv.clone()
    width = shape.dim // 2 if half else shape.dim
    cos, sin = case.cos[:, :width].contiguous(), case.sin[:, :width].contiguous()
    rope_and_store(case.qkv, cos, sin, case.ints(case.positions, torch.int64), case.ints(case.slots), case.cache)
    split = shape.heads * shape.dim
    torch.testing.assert_close(case.qkv[:, :split].double(), queries.flatten(1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(case.qkv[:, split:], before[:, split:], rtol=0, atol=0)
    torch.testing.assert_close(case.cache, cache, rtol=1e-5, atol=1e-5, equal_nan=True)
