"""From a model folder to an engine: where it computes, how much memory it takes, and what runs it.

A GPU's memory goes to the weights first, then to what steps and graphs take, and most of the rest to KV
pages. torch's CUDA parts and Triton are imported only where a GPU is used.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from realm.engine import memory
from realm.engine.batch import Runner
from realm.engine.core import EngineCore
from realm.engine.options import EngineOptions
from realm.engine.scheduler import Scheduler
from realm.errors import RealmError
from realm.models import loading as weights_of
from realm.models.config import ModelConfig
from realm.models.llama import LlamaModel

__all__ = ["EngineOptions", "Progress", "load_engine", "resolve"]

log = logging.getLogger("realm.engine")

Progress = Callable[[str, int, int], None]
"""Called with (stage, done, total); stages are ``weights`` and, on a GPU, ``graphs``."""

LOG_INTERVAL = 3.0
"""Seconds between lines of the log that say how far a start is, where nobody watches."""

CPU_SEQUENCES, CPU_TOKEN_BUDGET = 256, 512
CUDA_SEQUENCES, CUDA_TOKEN_BUDGET = 512, 8192
CPU_ADAPTERS, CUDA_ADAPTER_CACHE = 512, 4096
"""MiB for adapters that steps can use (a GPU's are sized from free memory), and for others in main memory: on the
CPU the one is as near as the other."""


def resolve(options: EngineOptions) -> EngineOptions:
    """``options`` with the device chosen, and its defaults in place of what was left open: all but a GPU's KV pages
    and memory for adapters, which depend on what the weights leave.

    Raises:
        RealmError: ``engine_start`` if this machine or the device cannot do what was asked for.
    """
    device = options.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    elif device == "cuda" and not torch.cuda.is_available():
        raise RealmError(
            "engine_start", "--device cuda was asked for, but torch can use no GPU here: `realm doctor` says why"
        )
    cuda = device == "cuda"
    attention = "triton" if cuda else "sdpa"
    if options.attention not in ("auto", attention):
        raise RealmError(
            "engine_start",
            f"--attention {options.attention} does not work with --device {device}: give {attention}, or auto",
        )
    ahead = options.run_ahead
    if ahead < 0:
        # Where the one who asks for a step also computes it, there is nothing to be ahead of.
        ahead = 2 if cuda else int(options.threaded)
    none = options.adapter_memory < 0
    return dataclasses.replace(
        options,
        device=device,
        attention=attention,
        token_budget=options.token_budget or (CUDA_TOKEN_BUDGET if cuda else CPU_TOKEN_BUDGET),
        max_sequences=options.max_sequences or (CUDA_SEQUENCES if cuda else CPU_SEQUENCES),
        run_ahead=ahead,
        adapter_memory=options.adapter_memory or (0 if cuda else CPU_ADAPTERS),
        adapter_cache=-1 if none else options.adapter_cache or (CUDA_ADAPTER_CACHE if cuda else -1),
    )


def load_engine(
    folder: Path,
    options: EngineOptions | None = None,
    *,
    name: str | None = None,
    progress: Progress | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> EngineCore:
    """Load a model folder and build its engine. Without ``progress`` the log tells how far it is.

    Raises:
        RealmError: ``model_invalid`` (see :func:`realm.models.loading.load_weights`) or ``engine_start``
            when options, model and machine do not fit, or memory is not enough.
    """
    chosen = resolve(options or EngineOptions())
    if chosen.threads:
        torch.set_num_threads(chosen.threads)
    config = ModelConfig.load(folder)
    runner = _cuda_runner if chosen.device == "cuda" else _cpu_runner
    made = runner(folder, config, chosen, progress or _logged(time.monotonic))
    memory.warn_of_few(config, made.pages)
    scheduler = Scheduler(made.pages, token_budget=chosen.token_budget, max_sequences=chosen.max_sequences)
    return EngineCore(
        name or folder.name,
        made,
        scheduler,
        clock=clock,
        run_ahead=chosen.run_ahead,
        adapter_cache=_mebibytes(chosen.adapter_cache),
    )


def _mebibytes(count: int) -> int:
    """Bytes of an option in MiB, of which -1 is none."""
    return max(0, count) << 20


def _logged(clock: Callable[[], float]) -> Progress:
    """Progress that goes to the log, a line now and then: a start may take a minute, and a quick one says nothing."""
    said = clock()

    def log_it(stage: str, done: int, total: int) -> None:
        nonlocal said
        now = clock()
        if now - said >= LOG_INTERVAL:
            said = now
            log.info("loading: %s %s of %s", stage, f"{done:,}", f"{total:,}")

    return log_it


def _model(
    folder: Path, config: ModelConfig, chosen: EngineOptions, device: torch.device, progress: Progress
) -> LlamaModel:
    dtype = _dtype(chosen)

    def loaded(done: int, total: int) -> None:
        progress("weights", done, total)

    with torch.inference_mode():
        if chosen.random_weights:
            weights = weights_of.random_weights(config, dtype=dtype, device=device, progress=loaded)
        else:
            weights = weights_of.load_weights(folder, config, dtype=dtype, device=device, progress=loaded)
        return LlamaModel(config, weights)


def _dtype(chosen: EngineOptions) -> torch.dtype:
    return torch.bfloat16 if chosen.dtype == "bfloat16" else torch.float32


def _lanes(chosen: EngineOptions) -> int:
    """A lane for each sequence that goes on, and one for each row that is over with its step."""
    return 2 * chosen.max_sequences


def _cpu_runner(folder: Path, config: ModelConfig, chosen: EngineOptions, progress: Progress) -> Runner:
    from realm.engine.runners.cpu import CpuRunner

    dtype, device = _dtype(chosen), torch.device("cpu")
    if chosen.threaded:
        # Each thread that uses torch gets a pool of threads, and libgomp lets none of them wait by spinning once
        # there are more than processors: a step of 32 rows then takes 55 rather than 36 ms. So the pool that
        # loads goes with its thread, and the computing thread's is the only one.
        with ThreadPoolExecutor(1) as loader:
            model = loader.submit(_model, folder, config, chosen, device, progress).result()
    else:
        model = _model(folder, config, chosen, device, progress)
    pages = chosen.pages or memory.cpu_pages(config, dtype, memory.available_memory())
    with memory.explained("the KV pages", device, needed=pages * memory.page_bytes(config, dtype), lower=_LOWER_PAGES):
        return CpuRunner(
            model,
            pages=pages,
            lanes=_lanes(chosen),
            threaded=chosen.threaded,
            adapter_memory=_mebibytes(chosen.adapter_memory),
        )


def _gpu() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


def _cuda_runner(folder: Path, config: ModelConfig, chosen: EngineOptions, progress: Progress) -> Runner:
    from realm.engine.runners.cuda import CudaRunner
    from realm.engine.runners.cuda_memory import activation_bytes, adapter_bytes

    dtype = _dtype(chosen)
    needed = memory.weight_bytes(config, dtype)
    with memory.explained("torch and CUDA themselves", torch.device("cuda"), needed=_CUDA_CONTEXT, lower=_LOWER_OTHERS):
        # The first thing that takes memory: CUDA's own, for this process.
        device = _gpu()
        free = memory.device_memory(device)
    if needed > free:
        raise memory.too_little("the weights", needed=needed, free=free, lower=_LOWER_WEIGHTS)
    began = time.perf_counter()
    with memory.explained("the weights", device, needed=needed, lower=_LOWER_WEIGHTS):
        model = _model(folder, config, chosen, device, progress)
    free = memory.device_memory(device)
    lanes = _lanes(chosen)
    reserved = activation_bytes(config, dtype, chosen.token_budget, lanes)
    adapters = _cuda_adapters(config, chosen, free, reserved + adapter_bytes(config, dtype, chosen.token_budget, lanes))
    if adapters:
        reserved += adapters + adapter_bytes(config, dtype, chosen.token_budget, lanes)
    pages = memory.cuda_pages(
        config, dtype, free=free, reserved=reserved, pages=chosen.pages, fraction=chosen.kv_fraction
    )
    loaded = time.perf_counter()
    total = reserved + pages * memory.page_bytes(config, dtype)
    with memory.explained("the KV pages and the memory of steps", device, needed=total, lower=_LOWER_PAGES):
        runner = CudaRunner(
            model,
            pages=pages,
            lanes=lanes,
            token_budget=chosen.token_budget,
            adapter_memory=adapters,
            progress=lambda done, of: progress("graphs", done, of),
        )
    log.info(
        "weights of %.2f GiB loaded in %.1f s; %s KV pages of %.2f GiB, %.2f GiB for adapters, graphs made in %.1f s",
        needed / 2**30,
        loaded - began,
        f"{pages:,}",
        pages * memory.page_bytes(config, dtype) / 2**30,
        adapters / 2**30,
        time.perf_counter() - loaded,
    )
    return runner


def _cuda_adapters(config: ModelConfig, chosen: EngineOptions, free: int, reserved: int) -> int:
    """Bytes for adapters; ``reserved`` are those that steps take, with them."""
    if chosen.adapter_memory:
        return _mebibytes(chosen.adapter_memory)
    left = free - reserved
    # Who chose the KV pages gets them; otherwise adapters take at most a quarter of what could be pages.
    room = left - (chosen.pages + 1) * memory.page_bytes(config, _dtype(chosen)) if chosen.pages else left // 4
    return memory.adapter_memory(free=free, room=room)


_CUDA_CONTEXT = 512 << 20
"""What CUDA takes of a GPU for a process before anything else, about."""

_LOWER_OTHERS = "end what else uses the GPU, or choose another one with CUDA_VISIBLE_DEVICES"
_LOWER_WEIGHTS = f"give --dtype bfloat16 if it is float32, {_LOWER_OTHERS}"
_LOWER_PAGES = "lower --kv-pages (or --kv-fraction), --adapter-memory, --token-budget or --max-sequences"
