"""Throughput of the whole stack, beside the same engine without guests and beside transformers.

    python -m tests.benchmarks.bench_serving [--guests 1,8,32] [--prompt 64] [--new 64] [--repeats 3]
        [--model FOLDER] [--json FILE]

Three cases, each in its own process, taken in turn within every repeat so that all see the same
machine:

* ``transformers``: ``generate`` on one padded batch, bf16, greedy, on the GPU where there is one;
* ``native``: this engine under a plain loop, without guests (``realm bench serving --native``);
* ``clients``: ``realm serve`` with a guest behind every token, all output streamed to SDK clients of three
  tenants over WebSocket (``realm bench serving --clients``). Clients run on the same machine.

Rates are new tokens a second, all requests together, prefill included. Medians of the repeats.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from realm.bench.report import environment
from realm.settings import default_home
from tests.benchmarks.host import REPOSITORY

CASES = ("transformers", "native", "clients")


def run_transformers(model: Path, counts: list[int], prompt: int, new: int) -> dict[int, float]:
    """New tokens a second of each number of requests."""
    import torch
    import transformers

    transformers.utils.logging.set_verbosity_error()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    loaded = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).eval().to(device)
    rates = {}
    with torch.inference_mode():
        for count in [1, *counts]:  # the first is the warm-up, and is overwritten
            ids = torch.randint(3, loaded.config.vocab_size, (count, prompt), device=device)
            began = time.perf_counter()
            out = loaded.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=new, min_new_tokens=new
            )
            assert out.cpu().shape == (count, prompt + new)
            rates[count] = count * new / (time.perf_counter() - began)
    return rates


def run_bench(case: str, options: argparse.Namespace) -> dict[int, float]:
    """The same of ``realm bench serving``."""
    with tempfile.TemporaryDirectory() as folder:
        figures = Path(folder) / "figures.json"
        command = [sys.executable, "-m", "realm.cli", "bench", "serving", "--no-processes", f"--{case}"]
        command += ["--model", str(options.model), "--guests", options.guests, "--repeats", "1"]
        command += ["--prompt", str(options.prompt), "--new", str(options.new), "--json", str(figures)]
        subprocess.run(command, cwd=REPOSITORY, stdout=subprocess.DEVNULL, check=True)
        cases = json.loads(figures.read_text())["cases"]
    return {case["requests"]: case["median"]["tokens_per_second"] for case in cases}


def run_in_process(options: argparse.Namespace) -> dict[int, float]:
    """:func:`run_transformers` in a process of its own, which gives its memory back."""
    command = [sys.executable, "-m", "tests.benchmarks.bench_serving", "--transformers-only"]
    command += ["--model", str(options.model), "--guests", options.guests]
    command += ["--prompt", str(options.prompt), "--new", str(options.new)]
    done = subprocess.run(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True, check=True)
    return {int(count): rate for count, rate in json.loads(done.stdout.splitlines()[-1]).items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--guests", default="1,8,32", help="numbers of concurrent requests")
    parser.add_argument("--prompt", type=int, default=64, help="prompt tokens")
    parser.add_argument("--new", type=int, default=64, help="new tokens")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--model", type=Path, default=default_home() / "models" / "smollm2-135m-instruct")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--transformers-only", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.model = options.model.resolve()
    counts = [int(count) for count in options.guests.split(",")]
    if options.transformers_only:
        print(json.dumps(run_transformers(options.model, counts, options.prompt, options.new)))
        return
    results: dict[str, list[dict[int, float]]] = {case: [] for case in CASES}
    for _ in range(options.repeats):
        for case in CASES:
            rates = run_in_process(options) if case == "transformers" else run_bench(case, options)
            results[case].append(rates)
            print(f"  {case}: { {count: round(rate) for count, rate in rates.items()} }", file=sys.stderr)
    rows = report(results, counts, options)
    if options.json:
        document = {"environment": environment(), "rows": rows, "raw": results}
        options.json.write_text(json.dumps(document, indent=1))


def report(
    results: dict[str, list[dict[int, float]]], counts: list[int], options: argparse.Namespace
) -> list[dict[str, Any]]:
    """Print the medians as a table; its rows."""

    def median(case: str, count: int) -> float:
        return statistics.median(rates[count] for rates in results[case])

    print(f"\n{options.prompt} prompt + {options.new} new tokens, bf16, new tokens/s (median of {options.repeats})\n")
    print("| requests | transformers | native | clients | clients/transformers | clients/native | clients/clients(1) |")
    print("|---|---|---|---|---|---|---|")
    rows = []
    for count in counts:
        rates = {case: median(case, count) for case in CASES}
        row = {
            "requests": count,
            **rates,
            "over_transformers": rates["clients"] / rates["transformers"],
            "over_native": rates["clients"] / rates["native"],
            "over_one": rates["clients"] / median("clients", counts[0]),
        }
        rows.append(row)
        cells = [f"{rates[case]:.0f}" for case in CASES]
        cells += [f"{row[key]:.2f}" for key in ("over_transformers", "over_native", "over_one")]
        print(f"| {count} | {' | '.join(cells)} |")
    return rows


if __name__ == "__main__":
    main()
