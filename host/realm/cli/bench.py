"""``realm bench``: how fast this machine serves guests."""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import typer

from realm.cli.terminal import err, out, table
from realm.engine.options import MOST_AHEAD, EngineOptions
from realm.settings import ServeSettings, default_workers

if TYPE_CHECKING:
    from realm.bench.adapters import AdapterUse
    from realm.bench.workload import Measured, Workload

app = typer.Typer(help="Measure how fast this machine serves guests.", no_args_is_help=True)

_ENGINE = EngineOptions()


@app.callback()
def bench() -> None:
    """Measure how fast this machine serves guests."""


@app.command()
def serving(
    shape: Annotated[str, typer.Option(help="Measure a model of this shape, with random weights.")] = "",
    model: Annotated[str, typer.Option(help="Measure a stored model (a name), or a model folder (a path).")] = "",
    guests: Annotated[str, typer.Option(help="Numbers of requests at once, with commas.")] = "1,8,64,256",
    prompt: Annotated[int, typer.Option(min=1, help="Prompt tokens of each request.")] = 128,
    new: Annotated[int, typer.Option(min=1, help="New tokens of each request.")] = 128,
    repeats: Annotated[int, typer.Option(min=1, help="How often each case is measured.")] = 3,
    temperature: Annotated[float, typer.Option(min=0, max=100, help="0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0, max=1)] = 1.0,
    top_k: Annotated[int, typer.Option(min=0)] = 0,
    guests_alone: Annotated[
        bool, typer.Option("--processes/--no-processes", help="Engine and guest workers, driven without clients.")
    ] = True,
    native: Annotated[bool, typer.Option("--native", help="Also the engine alone, without guests.")] = False,
    clients: Annotated[bool, typer.Option("--clients", help="Also the whole server, with SDK clients.")] = False,
    adapters: Annotated[
        str, typer.Option(help="Numbers of registered adapters, with commas; 0 measures without any first.")
    ] = "",
    adapter_rank: Annotated[int, typer.Option(min=1, max=256, help="Of each adapter.")] = 16,
    adapter_targets: Annotated[str, typer.Option(help="What adapters change: of q,k,v,o,gate,up,down.")] = "q,k,v,o",
    adapter_mix: Annotated[str, typer.Option(help="How a guest draws its adapter: uniform, or zipf.")] = "uniform",
    adapter_share: Annotated[float, typer.Option(max=1, help="Part of the guests that draw one.")] = 1.0,
    adapter_warm: Annotated[
        bool,
        typer.Option("--adapter-warm/--adapter-cold", help="Load all before measuring, as far as there is room."),
    ] = True,
    workers: Annotated[int | None, typer.Option(min=1, max=256, help="Guest worker processes.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, or auto.")] = _ENGINE.device,
    dtype: Annotated[str, typer.Option(help="bfloat16 or float32.")] = _ENGINE.dtype,
    attention: Annotated[str, typer.Option(help="sdpa, triton, or auto.")] = _ENGINE.attention,
    kv_pages: Annotated[int, typer.Option(min=0, help="KV pages of 16 tokens; 0 sizes by free memory.")] = 0,
    kv_fraction: Annotated[float, typer.Option(help="Part of the GPU's free memory for KV pages.")] = (
        _ENGINE.kv_fraction
    ),
    adapter_memory: Annotated[
        int, typer.Option(min=-1, help="MiB for adapters in use; 0 is the device's default, -1 does without adapters.")
    ] = _ENGINE.adapter_memory,
    adapter_cache: Annotated[
        int, typer.Option(min=-1, help="MiB of main memory for others; 0 is the device's default, -1 none.")
    ] = _ENGINE.adapter_cache,
    token_budget: Annotated[int, typer.Option(min=0, help="Most tokens of a step; 0 is the device's default.")] = 0,
    max_sequences: Annotated[int, typer.Option(min=0, help="Most sequences of a step; 0 is 256.")] = 0,
    run_ahead: Annotated[int, typer.Option(min=-1, max=MOST_AHEAD, help="-1 is the device's default.")] = -1,
    threads: Annotated[int, typer.Option(min=0, help="The engine's threads; 0 is torch's default.")] = 0,
    random_weights: Annotated[bool, typer.Option("--random-weights", help="Make weights up for --model too.")] = False,
    json: Annotated[Path | None, typer.Option("--json", dir_okay=False, help="Also write all figures here.")] = None,
    trace: Annotated[
        Path | None, typer.Option("--trace", dir_okay=False, help="Also write where the time goes (Chrome's format).")
    ] = None,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show what the processes log.")] = False,
) -> None:
    """Tokens a second of many guests at once, each behind every token of its own request.

    All requests begin together, with different random prompts; rates are new tokens a second of all of
    them, from the first one's start to the last one's end. Medians of the repeats.

    With --adapters the guests use LoRA adapters, made up, which the engine loads from files. Each number of
    registered ones is measured in turn with none of them used. --native and --clients stay without.
    """
    from realm.bench.home import bench_home
    from realm.bench.workload import Workload

    if bool(shape) == bool(model):
        raise typer.BadParameter("give --shape or --model, not both")
    if trace is not None and not guests_alone:
        raise typer.BadParameter("--trace records engine and workers: it does not go with --no-processes")
    if adapters and not guests_alone:
        raise typer.BadParameter("--adapters are used with engine and workers: it does not go with --no-processes")
    workload = Workload(
        guests=_numbers(guests, "--guests", 1),
        prompt=prompt,
        new=new,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        repeats=repeats,
        adapters=_adapter_use(adapters, adapter_rank, adapter_targets, adapter_mix, adapter_share, adapter_warm),
    )
    options = EngineOptions(
        device=device,
        dtype=dtype,
        attention=attention,
        pages=kv_pages,
        kv_fraction=kv_fraction,
        adapter_memory=adapter_memory,
        adapter_cache=adapter_cache,
        token_budget=token_budget,
        max_sequences=max_sequences,
        run_ahead=run_ahead,
        threads=threads,
        random_weights=random_weights or bool(shape),
    )
    kinds = [kind for kind, wanted in (("native", native), ("guests", guests_alone), ("clients", clients)) if wanted]
    if not kinds:
        raise typer.BadParameter("nothing to measure: --no-processes needs --native or --clients")
    with bench_home(shape, model) as (home, folder):
        settings = ServeSettings(home=home, workers=workers or default_workers(device), engine=options)
        results, gpus = _measure(settings, workload, folder, kinds, trace=trace, quiet=not verbose)
    _show(results, workload, shape or folder.name, settings)
    if json is not None:
        from realm.bench.report import as_json

        asked = {"model": shape or folder.name, "workers": settings.workers}
        asked |= {"workload": msgspec.to_builtins(workload), "engine": msgspec.to_builtins(options)}
        json.write_bytes(as_json(results, asked, gpus))


def _numbers(text: str, option: str, least: int) -> list[int]:
    try:
        numbers = [int(word) for word in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < least or len({*numbers}) < len(numbers):
        raise typer.BadParameter(f"{text!r} is not a list of different numbers such as 1,8,64", param_hint=option)
    return numbers


def _adapter_use(counts: str, rank: int, targets: str, mix: str, share: float, warm: bool) -> AdapterUse | None:
    """What --adapters and its companions say; None without it."""
    from realm.bench.adapters import MIXES, TARGETS, AdapterUse

    if not counts:
        return None
    words = targets.split(",")
    if not {*words} <= {*TARGETS} or len({*words}) < len(words):
        raise typer.BadParameter(
            f"{targets!r} is not a list of different ones of {','.join(TARGETS)}", param_hint="--adapter-targets"
        )
    if mix not in MIXES:
        raise typer.BadParameter(f"{mix!r} is not one of {', '.join(MIXES)}", param_hint="--adapter-mix")
    if not share > 0:
        raise typer.BadParameter(
            f"{share:g} is not more than 0; none in use is measured anyway", param_hint="--adapter-share"
        )
    numbers = sorted(_numbers(counts, "--adapters", 0))
    return AdapterUse(counts=numbers, rank=rank, targets=words, mix=mix, share=share, warm=warm)


def _measure(
    settings: ServeSettings,
    workload: Workload,
    model: Path,
    kinds: list[str],
    *,
    trace: Path | None,
    quiet: bool,
) -> tuple[dict[str, list[Measured]], list[dict[str, str]]]:
    """Each kind's measures, in order, and the GPUs as they were at the end of the last one."""
    from realm.bench.clients import MODULE, measure_clients
    from realm.bench.native import measure_native
    from realm.bench.processes import measure_processes
    from realm.bench.report import case_of, gpus
    from realm.guests.compiler import compile_module
    from realm.models.config import ModelConfig

    vocab = ModelConfig.load(model).vocab_size
    results: dict[str, list[Measured]] = {kind: [] for kind in kinds}
    seen: list[dict[str, str]] = []
    with err().status("starting") as shown, contextlib.ExitStack() as exit:
        common: dict[str, Any] = {"vocab": vocab, "quiet": quiet, "progress": shown.update}
        for kind in kinds:
            if kind == "native":
                measures = measure_native(settings, workload, model, **common)
            elif kind == "clients":
                measures = measure_clients(settings, workload, model, **common)
            else:
                module = asyncio.run(compile_module(MODULE, settings.home / "cache"))
                traces = Path(exit.enter_context(tempfile.TemporaryDirectory())) if trace is not None else None
                measures = measure_processes(settings, workload, model, module=module, traces=traces, **common)
            for measured in measures:
                results[kind].append(measured)
                err().print(f"{kind}, {case_of(measured)}: {measured.rate:,.0f} tokens/s")
                if len(results[kind]) == (workload.measures() if kind == "guests" else workload.once()):
                    # The engine is still there: clocks are those under load, or just after it.
                    seen = gpus()
            if kind == "guests" and trace is not None and traces is not None:
                _write_trace(traces, trace, results[kind])
    return results, seen


def _write_trace(traces: Path, path: Path, measured: list[Measured]) -> None:
    """Put the traces of the last repeat of each case together, and say what they show."""
    from realm.bench.report import by_case
    from realm.bench.tracing import Window, read_spans, summary, write_chrome

    spans = [read_spans(file) for file in sorted(traces.glob("*.trace"))]
    ends = {case: repeats[-1] for case, repeats in by_case(measured).items()}
    windows = [Window(str(case), one.began, one.began + one.seconds) for case, one in ends.items()]
    write_chrome(spans, windows, path)
    for one, window in zip(ends.values(), windows, strict=True):
        for line in summary(spans, window, one.tokens):
            out().print(line)


def _show(results: dict[str, list[Measured]], workload: Workload, name: str, settings: ServeSettings) -> None:
    from realm.bench.report import adapter_rows, table_rows

    drawn = "greedy"
    if workload.temperature:
        drawn = f"temperature {workload.temperature:g}, top-p {workload.top_p:g}, top-k {workload.top_k}"
    out().print(
        f"{name}, {settings.engine.dtype}, {workload.prompt} prompt + {workload.new} new tokens, {drawn}, "
        f"{settings.workers} workers; medians of {workload.repeats}"
    )
    headings, rows = table_rows(results)
    if rows:
        _print_table(headings, rows)
    use = workload.adapters
    headings, rows = adapter_rows(results.get("guests", []))
    if use is not None and rows:
        out().print(
            f"adapters of rank {use.rank} on {','.join(use.targets)}, "
            + (f"{use.share:.0%} of the guests have one, " if use.share < 1 else "")
            + ("all loaded before" if use.warm else "loaded as they are drawn")
        )
        _print_table(headings, rows)


def _print_table(headings: list[str], rows: list[list[str]]) -> None:
    made = table(*headings, right=tuple(heading for heading in headings if heading not in ("measured", "mix")))
    for row in rows:
        made.add_row(*row)
    out().print(made)
