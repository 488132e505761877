"""Parts of the CUDA runner that are plain arithmetic."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tests.interpreter  # noqa: F401
from realm.engine.runners.cuda_buckets import COMMON, Variant, bucket_sizes, fit
from realm.engine.runners.cuda_memory import activation_bytes, block_bytes
from realm.engine.runners.cuda_staging import ALIGNMENT, Block
from realm.engine.sampling import draws_of
from realm.messages import SamplingParams
from realm.models.shapes import SHAPES


@given(st.integers(1, 3000))
def test_every_batch_has_a_size_that_wastes_little(lanes: int) -> None:
    sizes = bucket_sizes(lanes)
    assert sizes == sorted(set(sizes))
    assert sizes[-1] == lanes
    assert len(sizes) <= 48
    for rows in range(1, lanes + 1):
        size = fit(sizes, rows)
        assert rows <= size <= max(rows + 3, 1.5 * rows)


@pytest.mark.parametrize(
    ("sampling", "variant"),
    [
        ([{}, {}], COMMON[0]),
        ([{}, {"temperature": 0.5}], COMMON[1]),
        ([{"top_p": 0.5, "top_k": 3}], COMMON[0]),
        ([{"temperature": 1.0}, {"top_p": 0.5}], Variant(False, True, False, False)),
        ([{"temperature": 1.0, "top_k": 4}], Variant(False, True, False, False)),
        ([{"temperature": 1.0, "min_p": 0.1}], Variant(False, True, False, False)),
        ([{"mask": b"\xff" * 20}, {"logprob": True}], Variant(True, False, True, True)),
    ],
)
def test_the_kind_of_draw(sampling: list[dict[str, object]], variant: Variant) -> None:
    assert Variant.of(draws_of([SamplingParams(**values) for values in sampling])) == variant  # type: ignore[arg-type]


KINDS = {np.int32: torch.int32, np.int64: torch.int64, np.float32: torch.float32, np.float64: torch.float64}


@given(st.lists(st.tuples(st.sampled_from(list(KINDS)), st.integers(0, 40)), max_size=12))
def test_what_is_placed_arrives(arrays: list[tuple[type, int]]) -> None:
    host, device = torch.zeros(4096, dtype=torch.uint8), torch.full((4096,), 255, dtype=torch.uint8)
    block = Block(0, host, device)
    placed = [block.place(kind, count) for kind, count in arrays]
    for at, (array, tensor) in enumerate(placed):
        array[:] = at + np.arange(len(array))
        assert tensor.dtype == KINDS[arrays[at][0]]
        assert tensor.storage_offset() * tensor.element_size() % ALIGNMENT == 0
    block.send()
    for at, (array, tensor) in enumerate(placed):
        assert tensor.tolist() == [at + index for index in range(len(array))]


def test_a_full_block_says_so() -> None:
    block = Block(0, torch.zeros(64, dtype=torch.uint8), torch.zeros(64, dtype=torch.uint8))
    block.place(np.int64, 8)
    with pytest.raises(ValueError, match="more than 64 bytes"):
        block.place(np.int32, 1)
    block.reset()
    block.place(np.int32, 16)


def test_memory_grows_with_what_needs_it() -> None:
    config = SHAPES["llama-3.2-1b"]
    usual = activation_bytes(config, torch.bfloat16, 8192, 1024)
    # The widest products of 8,192 tokens and the logits of 512 rows alone.
    assert usual > 8192 * 3 * config.intermediate_size * 2 + 512 * config.vocab_size * 2
    assert usual < 4 << 30
    assert activation_bytes(config, torch.bfloat16, 16384, 1024) > usual
    assert activation_bytes(config, torch.float32, 8192, 1024) > usual
    assert activation_bytes(config, torch.bfloat16, 8192, 2048) > usual
    assert block_bytes(config, 8192, 512) < 64 << 20


def test_kernels_compile_for_a_gpu() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, "-m", "tests.runner_kernels"], capture_output=True, env=environment)
    assert run.returncode == 0, run.stderr.decode()
    assert run.stdout.split() == [b"_embed", b"_keep", b"_spread", b"_copy"]
