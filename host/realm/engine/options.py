"""How an engine is built, as data. No torch here: the gateway passes it on as the engine process's arguments."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from realm.errors import RealmError

DEVICES = ("auto", "cpu", "cuda")
DTYPES = ("bfloat16", "float32")
ATTENTIONS = ("auto", "sdpa", "triton")
MOST_AHEAD = 2
MOST_MIB = 1 << 30
"""A pebibyte; sizes in bytes stay far below 64 bits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """How an engine is built. What is left at its default suits the device (:func:`realm.engine.loading.resolve`).

    Attributes:
        device: ``cpu``, ``cuda`` (the first GPU that is visible), or ``auto``: a GPU where torch sees one.
        dtype: ``bfloat16`` for speed, ``float32`` for exactness.
        attention: ``sdpa`` (CPU), ``triton`` (CUDA), or ``auto``.
        pages: KV pages of 16 tokens; 0 sizes the pool from free memory (:mod:`realm.engine.memory`).
        kv_fraction: part of a GPU's memory for KV pages, of what weights, activations and graphs leave.
        token_budget: most tokens a step; bounds how long a step of prompts stalls decoding. 0 is the device's default.
        max_sequences: most sequences a step; 0 is the device's default.
        run_ahead: steps that are launched before the guests have answered the one before; -1 is the
            device's default, 0 none.
        threads: torch threads; 0 leaves torch's default.
        adapter_memory: MiB for adapters that steps can use; 0 is the device's default, -1 does without adapters.
        adapter_cache: MiB of main memory for adapters beside those; 0 is the device's default, -1 none.
        random_weights: do not read weights but make them up: for measuring, with folders of
            :func:`realm.models.shapes.write_shape`.
        threaded: compute in a thread of its own on the CPU, so that its owner can do other things meanwhile.

    Raises:
        RealmError: ``invalid_params`` naming what cannot be.
    """

    device: str = "auto"
    dtype: str = "bfloat16"
    attention: str = "auto"
    pages: int = 0
    kv_fraction: float = 0.9
    token_budget: int = 0
    max_sequences: int = 0
    run_ahead: int = -1
    threads: int = 0
    adapter_memory: int = 0
    adapter_cache: int = 0
    random_weights: bool = False
    threaded: bool = False

    def __post_init__(self) -> None:
        for name, allowed in (("device", DEVICES), ("dtype", DTYPES), ("attention", ATTENTIONS)):
            value = getattr(self, name)
            if value not in allowed:
                raise _invalid(name, f"is {value!r}, not one of {', '.join(allowed)}")
        for name in ("pages", "token_budget", "max_sequences", "threads"):
            if getattr(self, name) < 0:
                raise _invalid(name, f"is {getattr(self, name)}; 0 or more is needed")
        for name in ("adapter_memory", "adapter_cache"):
            value = getattr(self, name)
            if not -1 <= value <= MOST_MIB:
                raise _invalid(name, f"is {value}; -1 (none), 0 (the device's default) to {MOST_MIB} MiB is needed")
        if not 0 < self.kv_fraction <= 1:
            raise _invalid("kv_fraction", f"is {self.kv_fraction:g}; more than 0 and at most 1 is needed")
        if not -1 <= self.run_ahead <= MOST_AHEAD:
            raise _invalid("run_ahead", f"is {self.run_ahead}; -1 (the device's default) to {MOST_AHEAD} is needed")

    def arguments(self) -> list[str]:
        """The engine process's arguments that :func:`read` turns into these options (all but ``threaded``)."""
        values = {
            "--device": self.device,
            "--dtype": self.dtype,
            "--attention": self.attention,
            "--kv-pages": self.pages,
            "--kv-fraction": self.kv_fraction,
            "--token-budget": self.token_budget,
            "--max-sequences": self.max_sequences,
            "--run-ahead": self.run_ahead,
            "--threads": self.threads,
            "--adapter-memory": self.adapter_memory,
            "--adapter-cache": self.adapter_cache,
        }
        # One word each, because a negative number after a space would look like an option.
        words = [f"{flag}={value}" for flag, value in values.items()]
        return words + ["--random-weights"] * self.random_weights


def declare(parser: argparse.ArgumentParser) -> None:
    """Give ``parser`` the options; their defaults are those of :class:`EngineOptions`."""
    default = EngineOptions()
    add = parser.add_argument
    add("--device", default=default.device, choices=DEVICES, help="auto takes a GPU where there is one")
    add("--dtype", default=default.dtype, choices=DTYPES)
    add("--attention", default=default.attention, choices=ATTENTIONS, help="auto takes the device's")
    add("--kv-pages", type=int, default=default.pages, help="pages of 16 tokens; 0 sizes from free memory")
    add("--kv-fraction", type=float, default=default.kv_fraction, help="part of a GPU's free memory for KV pages")
    add("--token-budget", type=int, default=default.token_budget, help="most tokens a step; 0 is the device's default")
    add("--max-sequences", type=int, default=default.max_sequences, help="most sequences a step; 0 is the default")
    add("--run-ahead", type=int, default=default.run_ahead, help="steps launched ahead; -1 is the device's default")
    add("--threads", type=int, default=default.threads, help="torch threads; 0 is torch's default")
    add("--adapter-memory", type=int, default=default.adapter_memory, help="MiB; 0 is the default, -1 no adapters")
    add(
        "--adapter-cache", type=int, default=default.adapter_cache, help="MiB of main memory; 0 is the default, -1 none"
    )
    add("--random-weights", action="store_true", help="make weights up instead of reading them")


def read(parsed: argparse.Namespace, *, threaded: bool = False) -> EngineOptions:
    """The options that were declared by :func:`declare`. Raises as :class:`EngineOptions`."""
    return EngineOptions(
        device=parsed.device,
        dtype=parsed.dtype,
        attention=parsed.attention,
        pages=parsed.kv_pages,
        kv_fraction=parsed.kv_fraction,
        token_budget=parsed.token_budget,
        max_sequences=parsed.max_sequences,
        run_ahead=parsed.run_ahead,
        threads=parsed.threads,
        adapter_memory=parsed.adapter_memory,
        adapter_cache=parsed.adapter_cache,
        random_weights=parsed.random_weights,
        threaded=threaded,
    )


def _invalid(name: str, problem: str) -> RealmError:
    return RealmError("invalid_params", f"{name} {problem}", details={"param": name})
