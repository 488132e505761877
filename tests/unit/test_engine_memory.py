"""How much an engine takes, and what it says where that is not there."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from realm.engine import memory
from realm.engine.kv_cache import PAGE_SIZE
from realm.engine.memory import (
    adapter_memory,
    context_pages,
    cpu_pages,
    cuda_pages,
    explained,
    page_bytes,
    warn_of_few,
    weight_bytes,
)
from realm.errors import RealmError
from realm.models.config import ModelConfig
from realm.models.shapes import SHAPES

BF16, F32 = torch.bfloat16, torch.float32
LLAMA, SMOL = SHAPES["llama-3.2-1b"], SHAPES["smollm2-135m"]
GIB = 1 << 30


def test_sizes_of_known_models() -> None:
    # 16 layers x 8 heads x 64 x (keys and values) x 2 bytes = 32 KiB a token.
    assert page_bytes(LLAMA, BF16) == PAGE_SIZE * 32 << 10 and page_bytes(LLAMA, F32) == PAGE_SIZE * 64 << 10
    assert page_bytes(SMOL, BF16) == PAGE_SIZE * 30 * 3 * 64 * 2 * 2
    assert weight_bytes(LLAMA, BF16) == 1_235_814_400 * 2 and weight_bytes(SMOL, F32) == 134_515_008 * 4


def test_main_memory_is_left_to_others() -> None:
    each = page_bytes(SMOL, BF16)
    assert cpu_pages(SMOL, BF16, 4 * 100 * each) == 100
    assert cpu_pages(SMOL, BF16, 1 << 50) == 8 * 8192 // PAGE_SIZE
    assert cpu_pages(SMOL, BF16, 0) == 1


CONFIGS = st.sampled_from([*SHAPES.values()])


@given(CONFIGS, st.integers(0, 200 * GIB), st.integers(0, 20 * GIB), st.floats(0.01, 1))
def test_pages_of_a_gpu_fit_beside_what_else_there_is(
    config: ModelConfig, free: int, reserved: int, fraction: float
) -> None:
    each = page_bytes(config, BF16)
    left = free - reserved - each
    try:
        pages = cuda_pages(config, BF16, free=free, reserved=reserved, pages=0, fraction=fraction)
    except RealmError as error:
        assert error.code == "engine_start" and fraction * left < each
        assert error.details == {"needed": reserved + 2 * each, "free": free}
        return
    assert pages >= 1 and pages * each <= fraction * left
    # Not one page less than it may have.
    assert (pages + 1) * each > fraction * left - 1


@given(CONFIGS, st.integers(0, 200 * GIB), st.integers(0, 20 * GIB), st.integers(1, 1 << 20))
def test_chosen_pages_are_taken_or_refused(config: ModelConfig, free: int, reserved: int, pages: int) -> None:
    each = page_bytes(config, BF16)
    needed = reserved + (pages + 1) * each
    if needed <= free:
        assert cuda_pages(config, BF16, free=free, reserved=reserved, pages=pages, fraction=0.01) == pages
        return
    with pytest.raises(RealmError) as caught:
        cuda_pages(config, BF16, free=free, reserved=reserved, pages=pages, fraction=0.01)
    assert caught.value.code == "engine_start" and caught.value.details == {"needed": needed, "free": free}


@given(st.integers(0, 200 * GIB), st.integers(1, 1 << 20))
def test_the_advice_of_a_refusal_works(free: int, pages: int) -> None:
    assume((pages + 1) * page_bytes(LLAMA, BF16) + GIB > free)
    with pytest.raises(RealmError) as caught:
        cuda_pages(LLAMA, BF16, free=free, reserved=GIB, pages=pages, fraction=0.9)
    advised = int(caught.value.message.partition("give --kv-pages ")[2].split()[0])
    if advised:
        assert cuda_pages(LLAMA, BF16, free=free, reserved=GIB, pages=advised, fraction=0.9) == advised
    assert advised < pages


def test_a_refusal_says_needed_free_and_what_to_lower() -> None:
    with pytest.raises(RealmError) as caught:
        cuda_pages(LLAMA, BF16, free=3 * GIB, reserved=2 * GIB, pages=8192, fraction=0.9)
    message = caught.value.message
    assert "8,192 KV pages" in message and "6.00 GiB" in message and "3.00 GiB are free" in message
    assert "--kv-pages 2047" in message and "--token-budget" in message


@given(st.integers(0, 200 * GIB), st.integers(-GIB, 200 * GIB))
def test_adapters_take_their_part_where_there_is_room(free: int, room: int) -> None:
    given = adapter_memory(free=free, room=room)
    assert given <= max(0, room) and given <= 8 * GIB and given % (1 << 20) == 0
    if room >= free // 12 and room >= 256 << 20:
        assert given >= min(8 * GIB, max(256 << 20, free // 12 - (1 << 20)))
    assert given == 0 or given >= 16 << 20


def test_a_pool_below_one_context_is_said(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    warn_of_few(LLAMA, context_pages(LLAMA))
    assert not caplog.records
    warn_of_few(LLAMA, 2048)
    (record,) = caplog.records
    assert "2,048 KV pages hold 32,768 tokens" in record.getMessage() and "131,072" in record.getMessage()


def test_running_out_of_memory_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "device_memory", lambda device: 3 * GIB)
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    for error in (torch.OutOfMemoryError("CUDA out of memory. Tried …"), RuntimeError("CUDA error: out of memory")):
        with pytest.raises(RealmError) as caught, explained("the weights", cuda, needed=5 * GIB, lower="do this"):
            raise error
        assert caught.value.message == "the weights need 5.00 GiB, and 3.00 GiB are free: do this"
        assert caught.value.details == {"needed": 5 * GIB, "free": 3 * GIB} and caught.value.__cause__ is error
    # What torch's own allocator really says, of more than an address space.
    with pytest.raises(RealmError, match="the pool need"), explained("the pool", cpu, needed=1, lower=""):
        torch.empty(1 << 60)


def test_a_gpu_that_cannot_even_be_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(device: torch.device) -> int:
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(memory, "device_memory", asked)
    with (
        pytest.raises(RealmError, match=r"0\.00 GiB are free"),
        explained("CUDA", torch.device("cuda"), needed=1, lower=""),
    ):
        memory.device_memory(torch.device("cuda"))


def test_other_errors_stay_what_they_are() -> None:
    with pytest.raises(RuntimeError, match="illegal address"), explained("x", torch.device("cuda"), needed=1, lower=""):
        raise RuntimeError("CUDA error: an illegal address was met")


def test_free_memory_of_this_machine() -> None:
    total = int(Path("/proc/meminfo").read_text().split("MemTotal:")[1].split()[0]) << 10
    assert 0 < memory.available_memory() <= total
