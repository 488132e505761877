"""The forward pass' kernels on a GPU against float64: big shapes, bfloat16, CUDA graphs, and races."""

from __future__ import annotations

import random

import pytest
import torch

from realm.engine.kernels.attention_decode import DecodeWorkspace, attention_decode, decode_splits
from realm.engine.kernels.elementwise import add_rms_norm, silu_mul
from realm.engine.kernels.skinny import SKINNY_ROWS, skinny_linear
from tests.kernel_cases import Case, Shape, attended, make_case, make_linear, prefill, rotated, stored

CUDA = torch.device("cuda")
LLAMA_1B, SMOLLM, LLAMA_8B = Shape(32, 8, 64), Shape(9, 3, 64), Shape(32, 8, 128)
SHAPES = [LLAMA_1B, SMOLLM, LLAMA_8B, Shape(6, 2, 8), Shape(4, 4, 96), Shape(8, 1, 256), Shape(40, 2, 48)]
# bfloat16 has 8 bits: of the weights of attention, of keys after rotation, and of the result.
TOLERANCES = {torch.float32: (1e-4, 1e-5), torch.bfloat16: (2.0**-6, 2.0**-6)}


def assert_near(actual: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    rtol, atol = TOLERANCES[dtype]
    torch.testing.assert_close(actual.double(), expected.double(), rtol=rtol, atol=atol, equal_nan=True)


class Decode:
    """A launch of the case's rows; a sequence without one is a padding row of NaN."""

    def __init__(self, case: Case, splits: int) -> None:
        count, shape = len(case.counts), case.shape
        self.case, self.splits = case, splits
        self.present = torch.tensor(case.counts, device=CUDA) > 0
        self.rows = torch.full((count, shape.width), float("nan"), dtype=case.qkv.dtype, device=CUDA)
        self.rows[self.present] = case.qkv
        ends = [context + 1 if rows else 0 for context, rows in zip(case.contexts, case.counts, strict=True)]
        self.lengths = case.ints(ends)
        self.out = self.rows.new_full((count, shape.heads * shape.dim), float("nan"))
        self.workspace = DecodeWorkspace.allocate(count * splits, count, shape.heads, shape.dim, CUDA)

    def __call__(self) -> None:
        case = self.case
        attention_decode(
            self.rows,
            case.cos,
            case.sin,
            case.cache,
            case.tables,
            self.lengths,
            self.out,
            self.workspace,
            splits=self.splits,
        )

    def check(self, expected: torch.Tensor) -> None:
        assert_near(self.out[self.present], expected, self.case.qkv.dtype)
        assert not self.out[~self.present].any()
        assert not self.workspace.arrived.any()


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("splits", [1, 2, 8, 64])
def test_decode(shape: Shape, dtype: torch.dtype, splits: int) -> None:
    numbers = random.Random(splits)
    contexts = [0, 1, 15, 16, 17, 0, 63, 64, 65, 127, 128, 129, *(numbers.randrange(3000) for _ in range(20)), 32_000]
    counts = [1] * len(contexts)
    counts[5] = 0
    case = make_case(shape, contexts, counts, dtype=dtype, device="cuda", seed=splits)
    expected, cache = attended(case), stored(case)
    decode = Decode(case, splits)
    decode()
    decode.check(expected)
    assert_near(case.cache, cache, dtype)


@pytest.mark.parametrize(("rows", "context"), [(1, 192), (8, 255), (64, 130), (256, 192), (1, 131_000), (3, 40_000)])
def test_decode_as_the_engine_launches_it(rows: int, context: int) -> None:
    case = make_case(LLAMA_1B, [context] * rows, [1] * rows, dtype=torch.bfloat16, device="cuda", seed=rows)
    expected = attended(case)
    multiprocessors = torch.cuda.get_device_properties(CUDA).multi_processor_count
    decode = Decode(case, decode_splits(rows, LLAMA_1B.kv_heads, context + 1, multiprocessors))
    decode()
    decode.check(expected)


def test_decode_in_a_graph_follows_the_lengths_and_is_the_same_each_time() -> None:
    """Parts are added up in their order, so a race between the programs of a row would show as another result."""
    contexts = [5000, 300, 0, 64, 20_000, 1000, 129, 4097]
    case = make_case(LLAMA_1B, contexts, [1] * len(contexts), dtype=torch.bfloat16, device="cuda")
    expected = attended(case)
    decode = Decode(case, 32)
    decode()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        decode()
    first = None
    for _ in range(300):
        decode.out.fill_(float("nan"))
        graph.replay()
        first = decode.out.clone() if first is None else first
        assert torch.equal(decode.out, first)
    decode.check(expected)
    # Now the rows are others: half of them padding, the rest shorter.
    shorter = [0 if index % 2 else context // 2 + 1 for index, context in enumerate(contexts)]
    decode.lengths.copy_(case.ints(shorter))
    graph.replay()
    replayed = decode.out.clone()
    decode()
    assert torch.equal(decode.out, replayed)
    assert not replayed[1::2].any()


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    ("contexts", "counts"),
    [
        ([0, 15, 1], [1, 1, 2]),
        ([0, 5, 0, 16, 1000], [7, 16, 0, 33, 100]),
        ([0, 2000, 31], [1025, 300, 64]),
    ],
    ids=str,
)
def test_prefill(shape: Shape, dtype: torch.dtype, contexts: list[int], counts: list[int]) -> None:
    case = make_case(shape, contexts, counts, dtype=dtype, device="cuda", seed=sum(counts))
    check_prefill(case, max(counts))


@pytest.mark.parametrize(
    ("contexts", "counts"), [([0] * 64, [128] * 64), ([0], [8192]), ([30_000], [2000])], ids=["prompts", "long", "late"]
)
def test_prefill_as_the_engine_launches_it(contexts: list[int], counts: list[int]) -> None:
    case = make_case(Shape(8, 2, 64), contexts, counts, dtype=torch.bfloat16, device="cuda")
    check_prefill(case, max(counts))


def check_prefill(case: Case, longest: int) -> None:
    queries, _, _ = rotated(case)
    expected, cache = attended(case), stored(case)
    out = prefill(case, longest)
    width = case.shape.heads * case.shape.dim
    assert_near(case.qkv[:, :width], queries.flatten(1), case.qkv.dtype)
    assert_near(case.cache, cache, case.qkv.dtype)
    assert_near(out, expected, case.qkv.dtype)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("width", [1, 576, 2048, 4097, 16_384])
@pytest.mark.parametrize("add", [False, True])
def test_add_rms_norm(dtype: torch.dtype, width: int, add: bool) -> None:
    x, residual = (3 * torch.randn(300, width, device=CUDA).to(dtype) for _ in range(2))
    if not add:
        residual.fill_(float("nan"))
    weight = torch.randn(width, device=CUDA).to(dtype)
    total = (x.double() + residual.double() if add else x.double()).to(dtype).double()
    expected = total / (total.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
    out = torch.full_like(x, float("nan"))
    add_rms_norm(x, residual, weight, out, 1e-5, add=add)
    assert_near(residual, total, dtype)
    assert_near(out, expected, dtype)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("width", [1, 80, 1536, 8192])
def test_silu_mul(dtype: torch.dtype, width: int) -> None:
    gate_up = (4 * torch.randn(300, 2 * width, device=CUDA)).to(dtype)
    gate_up[0, 0], gate_up[1, 0] = -200.0, 200.0
    gate, up = gate_up.double().chunk(2, dim=-1)
    out = gate_up.new_full((300, width), float("nan"))
    silu_mul(gate_up, out)
    assert_near(out, gate * torch.sigmoid(gate) * up, dtype)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize(("inner", "width"), [(2048, 3072), (8192, 2048), (576, 960), (1536, 576), (333, 97)])
@pytest.mark.parametrize(
    ("gain", "gated", "add"), [(False, False, True), (True, False, False), (True, True, False)], ids=str
)
def test_skinny_linear(dtype: torch.dtype, inner: int, width: int, gain: bool, gated: bool, add: bool) -> None:
    linear = make_linear(
        SKINNY_ROWS, inner, width, bias=True, gain=gain, gated=gated, add=add, dtype=dtype, device="cuda"
    )
    expected = linear.expected()
    skinny_linear(
        linear.x,
        linear.weight,
        linear.out,
        bias=linear.bias,
        gain=linear.gain,
        eps=linear.EPS,
        gated=gated,
        add=add,
    )
    assert_near(linear.out, expected, dtype)


def test_pages_beyond_two_thousand_million_elements() -> None:
    """Offsets into a cache of tens of gigabytes do not fit 32 bits."""
    case = make_case(LLAMA_1B, [700, 16, 0, 3000], [1, 1, 1, 1], dtype=torch.bfloat16, device="cuda", spare=300_000)
    assert case.cache[0].numel() > 2**31
    expected = attended(case)
    decode = Decode(case, 8)
    decode()
    decode.check(expected)
    case = make_case(LLAMA_1B, [700, 16, 0], [40, 1, 130], dtype=torch.bfloat16, device="cuda", spare=300_000)
    expected = attended(case)
    assert_near(prefill(case, 130), expected, torch.bfloat16)
