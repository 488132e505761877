"""What LoRA adapters of some guests do to the tokens of others: to their times, and to the tokens themselves.

    python -m tests.benchmarks.bench_adapters --shape llama-3.2-1b [--parts neighbour,traffic] [--json FILE]

The real engine and guest workers, driven as ``realm bench serving`` does; adapters are made up, and registered and
loaded as real ones are. Two parts:

*neighbour*: the time between the tokens of guests with an adapter of rank 8, alone and while another tenant's guests
decode beside them: with an adapter of rank 128, with one of rank 8, and, as a control, with none.

*traffic*: steady guests decode, half of them with adapters, while others come and go. In turn: nobody else
("quiet"); visitors without adapters ("plain"); visitors with adapters that are added, loaded, replaced and removed,
those of the steady guests too ("swap"); and six longer ones at a time without pause, each with another adapter, where
the memory holds those of the steady guests and three more ("crowded"). In float32 the steady guests' text must be the
same in all of them, or the benchmark fails. In bfloat16 it need not be, adapters or not: how a row is rounded depends
on how many rows a step has. Steps are those of the engine's trace while all steady guests decode; what loads cost
them is the difference between "swap" and "plain". In "crowded" the steady guests too wait for their adapters.

Within every repeat all cases are taken in turn, so that all see the same machine.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import itertools
import json
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from realm.bench.adapters import write_adapter
from realm.bench.clients import MODULE
from realm.bench.home import bench_home
from realm.bench.processes import Processes
from realm.bench.report import environment, gpus
from realm.bench.tracing import DEVICE, Spans, Window, read_spans
from realm.bench.workload import Prompts, Workload
from realm.engine.options import EngineOptions
from realm.guests.compiler import CompiledModule, compile_module
from realm.messages import AdapterFile, AdapterGone
from realm.models.config import ModelConfig
from realm.settings import ServeSettings, default_workers, gpu_present
from tests.benchmarks.watched_runs import Run, Watch, all_began, all_ended

SMALL, LARGE = 8, 128
"""Ranks of the small tenant's adapter and of its neighbour's."""

ALONE, CONTROL = "alone", "beside no adapter"
NEIGHBOURS = {ALONE: None, f"beside rank {LARGE}": "large", f"beside rank {SMALL}": "other", CONTROL: ""}
"""What the neighbour's guests have, by case: there is no neighbour (None), or an adapter's name ("": none)."""

QUIET, PLAIN, SWAP, CROWDED = "quiet", "plain", "swap", "crowded"
CASES = (QUIET, PLAIN, SWAP, CROWDED)
STEADY = 4
"""Adapters of the steady guests, if there are twice as many of these."""
FILES, NAMES = 17, 7
"""Visitors' adapters, and the names that these are given in turn: each time a name stands for another one."""
ROOM = 3
"""Adapters that the memory holds beside the steady ones."""
AT_ONCE = {QUIET: 0, PLAIN: ROOM - 1, SWAP: ROOM - 1, CROWDED: 2 * ROOM}
"""Most visitors at a time, each with another adapter. One that has just ended may still have its place."""

TARGETS = ["q", "k", "v", "o"]


def milliseconds(seconds: Any) -> dict[str, float]:
    """Median, 99th percentile, the largest, and how many there are."""
    found = np.asarray(seconds, dtype=np.float64) * 1e3
    p50, p99, most = (float(np.percentile(found, part)) for part in (50, 99, 100))
    return {"p50": round(p50, 4), "p99": round(p99, 4), "max": round(most, 4), "count": len(found)}


def table(headings: list[str], rows: list[list[str]]) -> None:
    print(f"| {' | '.join(headings)} |\n|{'---|' * len(headings)}")
    for row in rows:
        print(f"| {' | '.join(row)} |")


def cells(row: dict[str, float], *keys: str) -> list[str]:
    return [f"{row[key]:.3f}" for key in keys or ("p50", "p99", "max")]


def say(text: str) -> None:
    print(f"  {text}", file=sys.stderr, flush=True)


# --- a rank-8 tenant beside a rank-128 tenant ---------------------------------------------------------


def beside(watch: Watch, prompts: Prompts, guests: int, new: int, adapter: str | None, neighbours: int) -> list[float]:
    """Seconds between the tokens of the small tenant's guests. ``adapter`` is one of NEIGHBOURS' values."""
    others: list[Run] = []
    if adapter is not None:
        # They go on for longer than the small ones: the batch is the same for all that is measured.
        others = watch.start(("bob", prompt, 4 * new + 256, adapter) for prompt in prompts.take(neighbours))
        watch.until(all_began(others))
    small = watch.start(("ada", prompt, new, "small") for prompt in prompts.take(guests))
    watch.until(all_ended(small))
    if any(run.ended is not None for run in others):
        raise SystemExit("the neighbour's guests have ended before the others: what was measured is not what it says")
    watch.cancel(others)
    watch.until(all_ended(others))
    return [gap for run in small for gap in run.gaps()]


def neighbour(options: argparse.Namespace, settings: ServeSettings, model: Path, module: CompiledModule) -> Any:
    """Measure and print the first part."""
    config = ModelConfig.load(model)
    workload = Workload(guests=[options.guests], prompt=options.prompt, new=options.new)
    prompts = Prompts(config.vocab_size, workload.prompt, workload.seed)
    found: dict[str, list[float]] = {case: [] for case in NEIGHBOURS}
    with (
        tempfile.TemporaryDirectory(prefix="realm-adapters-") as folder,
        Processes(settings, model, traces=None, quiet=not options.verbose) as processes,
    ):
        wanted = (("small", SMALL, "ada"), ("other", SMALL, "bob"), ("large", LARGE, "bob"))
        processes.announce(
            write_adapter(Path(folder) / name, config, name, rank, TARGETS, seed, tenant=tenant)
            for seed, (name, rank, tenant) in enumerate(wanted)
        )
        watch = Watch(processes, module, workload)
        for adapter in NEIGHBOURS.values():
            beside(watch, prompts, options.guests, min(16, options.new), adapter, options.neighbours)
        for _ in range(options.repeats):
            for case, adapter in NEIGHBOURS.items():
                found[case] += beside(watch, prompts, options.guests, options.new, adapter, options.neighbours)
                say(f"{case}: {milliseconds(found[case])}")
    figures = {case: milliseconds(gaps) for case, gaps in found.items()}
    print(
        f"\ntime between the tokens of {options.guests} guests with an adapter of rank {SMALL}, ms, beside "
        f"{options.neighbours} guests of another tenant; {settings.engine.dtype}, {options.new} tokens x "
        f"{options.repeats}\n"
    )
    rows = []
    for case, row in figures.items():
        ratios = [row[key] / figures[base][key] for base in (ALONE, CONTROL) for key in ("p50", "p99")]
        rows.append([case, *cells(row), *(f"{ratio:.2f}" for ratio in ratios)])
    over = [f"{key} over {base}" for base in (ALONE, "no adapter") for key in ("p50", "p99")]
    table(["neighbour", "p50", "p99", "max", *over], rows)
    return {"figures": figures, "raw": found}


# --- others' adapters come and go ---------------------------------------------------------------------


@dataclass
class Seen:
    """One case of the second part, once.

    Attributes:
        window: while all steady guests decoded. texts: of each steady guest. gaps: seconds between their tokens.
        visitors: how many there were. first: seconds until each one's first text.
        loads: adapters that were read from disk meanwhile.
    """

    window: Window
    texts: list[bytes]
    gaps: list[float]
    visitors: int = 0
    first: list[float] = field(default_factory=list)
    loads: int = 0


def steady_adapters(options: argparse.Namespace) -> int:
    return int(max(1, min(STEADY, options.steady // 2)))


class Traffic:
    """Steady guests of one tenant and visitors of another, with the files of their adapters."""

    def __init__(self, folder: Path, config: ModelConfig, options: argparse.Namespace) -> None:
        self._options = options
        count = steady_adapters(options)
        self._steady = [self._adapter(folder, config, f"steady-{at}", "ada", at) for at in range(count)]
        self._others = [self._adapter(folder, config, f"other-{at}", "bob", STEADY + at) for at in range(FILES)]
        self._prompts = Prompts(config.vocab_size, options.prompt, 1)
        self._lasting = self._prompts.take(options.steady)
        self._turn = itertools.count()
        self._latest: dict[str, Run] = {}

    def _adapter(self, folder: Path, config: ModelConfig, name: str, tenant: str, seed: int) -> AdapterFile:
        return write_adapter(folder / name, config, name, self._options.rank, TARGETS, seed, tenant=tenant)

    def memory(self, dtype: str) -> int:
        """MiB that hold the steady guests' adapters and ROOM more, but not one in addition (unless they are tiny)."""
        size = Path(self._steady[0].path).stat().st_size
        if dtype == "float32" or not self._options.gpu:
            # A CPU offers half of it for a model in bfloat16, because it keeps some parts in float32.
            size *= 2
        return int((len(self._steady) + ROOM + 0.3) * size) // (1 << 20) + 1

    def run(self, processes: Processes, module: CompiledModule, case: str, new: int, *, adapters: bool = True) -> Seen:
        """Steady guests to their ends, with the case's visitors as long as all of them decode.

        ``adapters``: every second steady guest has one.
        """
        options = self._options
        watch = Watch(processes, module, Workload(guests=[options.steady]))
        # What was replaced or removed in the case before.
        processes.announce([*self._steady, *(AdapterGone("bob", f"visitor-{at}") for at in range(NAMES))])
        loads = processes.stats().adapter_loads
        steady = watch.start(
            ("ada", prompt, new, f"steady-{at // 2 % len(self._steady)}" if adapters and at % 2 else "")
            for at, prompt in enumerate(self._lasting)
        )
        watch.until(all_began(steady))
        seen = Seen(Window(case, time.perf_counter(), 0.0), [], [])
        visitors: list[Run] = []
        due = seen.window.began
        while all(run.ended is None for run in steady):
            wait = due - time.perf_counter()
            if wait <= 0 and sum(run.ended is None for run in visitors) < AT_ONCE[case]:
                visitors += self._visit(processes, watch, case)
                due = time.perf_counter() if case == CROWDED else max(due + options.every, time.perf_counter())
            watch.take(max(0.0, wait) or options.every)
        seen.window = Window(case, seen.window.began, time.perf_counter())
        watch.until(all_ended([*steady, *visitors]))
        if {run.tokens for run in steady} != {new}:
            raise SystemExit("a steady guest has not drawn all its tokens")
        seen.texts = [bytes(run.text) for run in steady]
        seen.gaps = [gap for run in steady for gap in run.gaps()]
        seen.visitors, seen.loads = len(visitors), processes.stats().adapter_loads - loads
        seen.first = [run.times[0] - run.began for run in visitors if run.times]
        return seen

    def _visit(self, processes: Processes, watch: Watch, case: str) -> list[Run]:
        """One visitor comes; where it has an adapter, that was added or has replaced another just before."""
        turn = next(self._turn)
        new = self._options.visitor_new * (4 if case == CROWDED else 1)
        tenant, name = "bob", ""
        if case != PLAIN:
            name = f"visitor-{turn % NAMES}"
            changes: list[AdapterFile | AdapterGone] = []
            other = f"visitor-{(turn + 1) % NAMES}"
            if not turn % 3 and other in self._latest and self._latest[other].times:
                # It may be in use, but nobody is about to ask for it.
                changes.append(AdapterGone("bob", other))
            file = self._others[turn % FILES]
            if case == SWAP and turn % 4 == 3:
                # What steady guests have goes on; whoever asks for the name now gets the new one.
                tenant, name = "ada", f"steady-{turn // 4 % len(self._steady)}"
            changes.append(msgspec.structs.replace(file, tenant=tenant, name=name))
            processes.announce(changes)
        (run,) = watch.start([(tenant, self._prompts.take(1)[0], new, name)])
        self._latest[name] = run
        return [run]


def steps_within(spans: Spans, window: Window) -> tuple[list[float], list[float]]:
    """Of the steps that lie whole in a window: how long each took, and how long after the one before it ended."""
    whole = (spans.began >= window.began) & (spans.ended <= window.ended)
    took = spans.ended[whole] - spans.began[whole]
    return took.tolist(), np.diff(spans.ended[whole]).tolist()


def traffic(
    options: argparse.Namespace, settings: ServeSettings, model: Path, module: CompiledModule, dtype: str
) -> Any:
    """Measure and print the second part. Raises SystemExit where a steady guest's text differs in float32."""
    exact = dtype == "float32"
    new = options.exact_new if exact else options.steady_new
    found: dict[str, list[Seen]] = {case: [] for case in CASES}
    with tempfile.TemporaryDirectory(prefix="realm-adapters-") as name:
        folder = Path(name)
        made = Traffic(folder, ModelConfig.load(model), options)
        engine = dataclasses.replace(settings.engine, dtype=dtype, adapter_memory=made.memory(dtype))
        settings = dataclasses.replace(settings, engine=engine)
        with Processes(settings, model, traces=folder, quiet=not options.verbose) as processes:
            for case in CASES:
                made.run(processes, module, case, min(32, new))
            base = made.run(processes, module, QUIET, new, adapters=False)
            for _ in range(options.repeats):
                for case in CASES:
                    found[case].append(made.run(processes, module, case, new))
                    say(f"{dtype}, {case}: {milliseconds(found[case][-1].gaps)}")
        spans = read_spans(folder / "engine.trace").named(DEVICE)
    print(
        f"\n{options.steady} steady guests of {new} tokens, half of them with {steady_adapters(options)} adapters of "
        f"rank {options.rank}, a visitor of {options.visitor_new} tokens every {options.every * 1e3:.0f} ms; {dtype}, "
        f"room for {steady_adapters(options) + ROOM} adapters, {options.repeats} times, ms\n"
    )
    figures: dict[str, Any] = {}
    rows = []
    wanted = found[QUIET][0].texts
    if any(one == other for one, other in zip(wanted[1::2], base.texts[1::2], strict=True)):
        raise SystemExit("a steady guest's adapter changes nothing: what is compared below would say nothing")
    for case, seen in found.items():
        took, apart = ([value for one in seen for value in steps_within(spans, one.window)[at]] for at in (0, 1))
        texts = [one.texts for one in seen]
        row: dict[str, Any] = {
            "steps": milliseconds(took),
            "apart": milliseconds(apart),
            "tokens": milliseconds([gap for one in seen for gap in one.gaps]),
            "slow": int((np.array(took) > 2 * np.median(took)).sum()),
            "visitors": sum(one.visitors for one in seen),
            "loads": sum(one.loads for one in seen),
            "first": milliseconds([first for one in seen for first in one.first]) if case != QUIET else None,
            "same": sum(text == other for each in texts for text, other in zip(each, wanted, strict=True)),
            "texts": sum(map(len, texts)),
        }
        figures[case] = row
        shown = [case, f"{row['steps']['count']}", *cells(row["steps"])]
        shown += [
            f"{row['steps']['max'] / row['steps']['p50']:.2f}",
            f"{row['slow']}",
            *cells(row["apart"], "p99", "max"),
        ]
        shown += [*cells(row["tokens"]), f"{row['visitors']}", f"{row['loads']}"]
        shown += cells(row["first"], "p50") if row["first"] else ["-"]
        rows.append([*shown, f"{row['same']}/{row['texts']}"])
    headings = ["visitors are", "steps", "step p50", "p99", "max", "max/p50", "> 2 x p50", "apart p99", "max"]
    headings += ["token p50", "p99", "max", "visitors", "loads", "their first", "same text"]
    table(headings, rows)
    different = [f"{case}: {row['texts'] - row['same']}" for case, row in figures.items() if row["same"] < row["texts"]]
    if exact and different:
        raise SystemExit(f"steady guests' texts differ from those without visitors ({', '.join(different)})")
    return figures


def read_options() -> argparse.Namespace:
    """The command line; what is left at its default suits the device."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--shape", default="", help="a model of this shape, with random weights (smollm2-135m)")
    add("--model", default="", help="or a stored model, or a model folder")
    add("--random-weights", action="store_true", help="make weights up for --model too")
    add("--parts", default="neighbour,traffic")
    add("--repeats", type=int, default=3)
    add("--prompt", type=int, default=128, help="prompt tokens of each guest")
    add("--guests", type=int, help="guests of the small tenant (16; on a CPU 4)")
    add("--neighbours", type=int, help="guests of its neighbour (16; on a CPU 4)")
    add("--new", type=int, help="tokens of each of the small tenant's (512; on a CPU 32)")
    add("--steady", type=int, help="steady guests (16; on a CPU 4)")
    add("--steady-new", type=int, help="tokens of each, in --dtype (2048; on a CPU 48)")
    add("--exact-new", type=int, help="tokens of each, in float32 (256; on a CPU 32)")
    add("--visitor-new", type=int, default=8, help="tokens of a visitor; four times as many where it is crowded")
    add("--every", type=float, help="seconds between visitors (0.03; on a CPU 0.3)")
    add("--rank", type=int, default=16, help="of the adapters of the second part, a multiple of 16")
    add("--workers", type=int)
    add("--device", default="auto")
    add("--dtype", default="bfloat16", help="of both parts; the second one is run in float32 too")
    add("--threads", type=int, default=0)
    add("--kv-pages", type=int, default=0)
    add("--adapter-cache", type=int, default=0, help="MiB of main memory for adapters; 0 is the device's default")
    add("--json", type=Path, help="also write the figures here")
    add("--verbose", action="store_true", help="show what the processes log")
    options = parser.parse_args()
    if options.steady is not None and options.steady < 2:
        parser.error("--steady must be at least 2: every second one has an adapter")
    if options.rank % 16:
        parser.error("--rank must be a multiple of 16: memory is given out by such steps")
    if options.model and options.shape:
        parser.error("give --shape or --model, not both")
    if not options.model:
        options.shape = options.shape or "smollm2-135m"
    options.gpu = options.device == "cuda" or (options.device == "auto" and gpu_present())
    defaults: dict[str, tuple[float, float]] = {
        "guests": (16, 4),
        "neighbours": (16, 4),
        "new": (512, 32),
        "steady": (16, 4),
    }
    defaults |= {"steady_new": (2048, 48), "exact_new": (256, 32), "every": (0.03, 0.3)}
    for option, (gpu, cpu) in defaults.items():
        if getattr(options, option) is None:
            setattr(options, option, gpu if options.gpu else cpu)
    return options


def main() -> None:
    options = read_options()
    engine = EngineOptions(
        device=options.device,
        dtype=options.dtype,
        threads=options.threads,
        pages=options.kv_pages,
        adapter_cache=options.adapter_cache,
        random_weights=options.random_weights or bool(options.shape),
    )
    found: dict[str, Any] = {}
    with bench_home(options.shape, options.model) as (home, model):
        settings = ServeSettings(home=home, workers=options.workers or default_workers(options.device), engine=engine)
        module = asyncio.run(compile_module(MODULE, home / "cache"))
        print(f"{model.name}, {settings.workers} workers")
        if "neighbour" in options.parts:
            found["neighbour"] = neighbour(options, settings, model, module)
        if "traffic" in options.parts:
            for dtype in dict.fromkeys(("float32", options.dtype)):
                found[f"traffic {dtype}"] = traffic(options, settings, model, module, dtype)
    if options.json:
        asked = {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()}
        document = {"environment": environment() | {"gpus": gpus()}, "asked": asked, "found": found}
        options.json.write_text(json.dumps(document, indent=1))


if __name__ == "__main__":
    main()
