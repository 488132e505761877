"""How long a draw takes on the GPU: ``python -m tests.benchmarks.bench_sampling``.

Each figure is the GPU time of one call inside a captured graph, in microseconds: the median of some replays,
each of 20 calls over four sets of logits in turn (at 256 rows they do not fit in the cache together).
``--kernels`` shows instead what each kernel of a call takes.
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table

from realm.engine.kernels.sampling import DeviceDraws, DeviceSampler

SETS = 4
CALLS = 20
REPLAYS = 15


@dataclass(frozen=True)
class Variant:
    """``spread``: standard deviation of the logits; 0.5 is about that of random weights, 3 has a few likely tokens."""

    name: str
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    spread: float = 3.0
    masked: bool = False
    logprobs: bool = False

    @property
    def filtered(self) -> bool:
        return bool(self.top_k or self.top_p < 1 or self.min_p)


VARIANTS = [
    Variant("greedy", 0.0),
    Variant("greedy, logprobs", 0.0, logprobs=True),
    Variant("greedy, masks", 0.0, masked=True),
    Variant("temperature"),
    Variant("temperature, masks, logprobs", masked=True, logprobs=True),
    Variant("top-p 0.9", top_p=0.9),
    Variant("top-p 0.9, flat", top_p=0.9, spread=0.5),
    Variant("top-p 0.9, very flat", 100.0, top_p=0.9, spread=0.5),
    Variant("top-k 50", top_k=50),
    Variant("top-k 50,000, flat", top_k=50_000, spread=0.5),
    Variant("top-k 50, top-p 0.9", top_k=50, top_p=0.9),
    Variant("min-p 0.05", min_p=0.05),
    Variant("all of them, masks, logprobs", 0.8, 50, 0.9, 0.05, masked=True, logprobs=True),
]


class Case:
    """One variant at one size, ready to be run."""

    def __init__(self, variant: Variant, vocab: int, rows: int, dtype: torch.dtype) -> None:
        generator = torch.Generator("cuda").manual_seed(0)

        def column(value: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
            return torch.full((rows,), value, dtype=dtype, device="cuda")

        self._variant = variant
        self._logits = [
            (torch.randn(rows, vocab, device="cuda", generator=generator) * variant.spread).to(dtype)
            for _ in range(SETS)
        ]
        self._draws = DeviceDraws(
            column(variant.temperature),
            column(variant.top_k, torch.int32),
            column(variant.top_p),
            column(variant.min_p),
            torch.rand(rows, device="cuda", dtype=torch.float64, generator=generator),
            torch.randint(-(2**31), 2**31, (rows, -(-vocab // 32)), device="cuda", generator=generator).int()
            if variant.masked
            else None,
        )
        self._sampler = DeviceSampler(vocab, rows, "cuda")
        self._rows = rows
        self._tokens = torch.zeros(rows, dtype=torch.int32, device="cuda")
        self._logprobs = torch.zeros(rows, device="cuda")

    def run(self, calls: int) -> None:
        variant = self._variant
        for call in range(calls):
            self._sampler.sample(
                self._logits[call % SETS],
                self._rows,
                self._draws,
                self._tokens,
                self._logprobs,
                greedy=variant.temperature == 0,
                filtered=variant.filtered,
                masked=variant.masked,
                logprobs=variant.logprobs,
            )

    def microseconds(self) -> float:
        """GPU time of one call."""
        self.run(SETS)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.run(CALLS)
        times = []
        for _ in range(REPLAYS):
            began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            began.record()
            graph.replay()
            ended.record()
            ended.synchronize()
            times.append(began.elapsed_time(ended) * 1000 / CALLS)
        return statistics.median(times)

    def kernels(self) -> dict[str, float]:
        """GPU microseconds of one call by kernel."""
        self.run(SETS)
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            self.run(CALLS)
            torch.cuda.synchronize()
        return {event.key: event.device_time_total / CALLS for event in profile.key_averages()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vocab", type=int, nargs="+", default=[128_256, 49_152])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 64, 256])
    parser.add_argument("--float32", action="store_true", help="logits of float32 rather than bfloat16")
    parser.add_argument("--kernels", action="store_true", help="time each kernel")
    options = parser.parse_args()
    dtype = torch.float32 if options.float32 else torch.bfloat16
    console = Console(width=160)
    for vocab in options.vocab:
        title = f"µs a draw, vocabulary {vocab:,}, {dtype}, {torch.cuda.get_device_name()}"
        if options.kernels:
            for rows in options.rows:
                for variant in VARIANTS:
                    console.print(f"{title}, {rows} rows, {variant.name}:")
                    for name, time in Case(variant, vocab, rows, dtype).kernels().items():
                        console.print(f"  {name:24} {time:8.1f}")
            continue
        table = Table("", *[f"{rows} rows" for rows in options.rows], title=title)
        for variant in VARIANTS:
            times = [Case(variant, vocab, rows, dtype).microseconds() for rows in options.rows]
            table.add_row(variant.name, *[f"{time:.1f}" for time in times])
        console.print(table)


if __name__ == "__main__":
    main()
