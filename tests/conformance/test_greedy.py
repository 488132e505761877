"""Greedy tokens of the real model, float32, against transformers: alone, merged, chunked, preempted, cached.

The oracle is teacher-forced: one transformers pass over prompt and our tokens must have our token as
its arg max at every position. By induction that is the same as equality with its greedy ``generate``.
A difference is accepted only where transformers itself shows a tie: its two best logits closer than
:data:`TIE` (float32 rounding gives differences of some 1e-5 in logits around 20), and so far there is none.
"""

from __future__ import annotations

import argparse
import asyncio
import inspect
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers

from realm.engine.loading import EngineOptions, load_engine
from realm.messages import EndRun, SamplingParams
from realm.models.tokenizer import Tokenizer
from tests.tiny import Driver

TIE = 1e-4
PROMPTS = 50
LONGEST = 900
NEW = 48
GREEDY = SamplingParams()

pytestmark = [pytest.mark.conformance, pytest.mark.timeout(900)]


def make_prompts(folder: Path) -> list[list[int]]:
    """English and code from the standard library, 1 to 900 tokens, evenly spread in log length."""
    text = "\n".join(
        [inspect.getsource(module) for module in (argparse, random, asyncio.queues)]
        + [inspect.getdoc(item) or "" for item in (argparse, inspect, random, asyncio.Queue, str, dict, list, int)]
    )
    tokens = Tokenizer(folder).encode(text, special=False)
    rng = random.Random(11)
    lengths = [max(1, round(LONGEST ** (i / (PROMPTS - 1)))) for i in range(PROMPTS)]
    starts = [rng.randrange(len(tokens) - LONGEST) for _ in lengths]
    return [tokens[start : start + length] for start, length in zip(starts, lengths, strict=True)]


class Fleet:
    """Drives one engine through all prompts in a given manner."""

    def __init__(self, folder: Path, **options: int) -> None:
        self.engine = load_engine(folder, EngineOptions(dtype="float32", **options))
        self.driver = Driver(self.engine)

    def generate(self, prompts: list[list[int]], arrivals: list[int] | None = None) -> list[list[int]]:
        """48 greedy tokens each; ``arrivals`` are step numbers at which the prompts come."""
        driver, steps = self.driver, 0
        arrivals = arrivals or [0] * len(prompts)
        waiting = sorted(range(len(prompts)), key=lambda i: arrivals[i])
        out: list[list[int]] = [[] for _ in prompts]
        seqs: dict[int, int] = {}
        calls: dict[int, int] = {}
        while waiting or calls:
            while waiting and arrivals[waiting[0]] <= steps:
                index = waiting.pop(0)
                seqs[index] = driver.open(f"tenant{index % 3}", run=index)
                calls[driver.ask(seqs[index], prompts[index], GREEDY)] = index
            driver.step()
            steps += 1
            for call in [call for call in calls if call in driver.answers]:
                (done,) = driver.wait(call)
                index = calls.pop(call)
                out[index].append(done.token)
                if len(out[index]) < NEW:
                    calls[driver.ask(seqs[index], [done.token], GREEDY)] = index
                else:
                    driver.op(EndRun(index))
        driver.engine.check()
        assert self.engine.stats().pages_used == 0
        return out


@pytest.fixture(scope="module")
def prompts(model_folder: Path) -> list[list[int]]:
    return make_prompts(model_folder)


@pytest.fixture(scope="module")
def oracle(model_folder: Path) -> Iterator[transformers.PreTrainedModel]:
    yield transformers.LlamaForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def together(model_folder: Path, prompts: list[list[int]]) -> list[list[int]]:
    return Fleet(model_folder, pages=4000, token_budget=512).generate(prompts)


@torch.inference_mode()
def logits_after(oracle: transformers.PreTrainedModel, prompt: list[int], tokens: list[int]) -> torch.Tensor:
    """transformers' logits [len(tokens), vocab] from which each of ``tokens`` should have been drawn."""
    got: torch.Tensor = oracle(torch.tensor([prompt + tokens[:-1]]), logits_to_keep=len(tokens)).logits[0].float()
    return got


def assert_same(
    oracle: transformers.PreTrainedModel, prompts: list[list[int]], ours: list[list[int]], want: list[list[int]]
) -> None:
    """``ours`` equals ``want``, or parts from it at a tie that transformers shows too."""
    ties = 0
    for prompt, mine, other in zip(prompts, ours, want, strict=True):
        assert len(mine) == NEW
        if mine == other:
            continue
        at = next(i for i in range(NEW) if mine[i] != other[i])
        values = logits_after(oracle, prompt, mine[: at + 1])[-1]
        gap = float(values.max() - values[mine[at]])
        assert gap < TIE, f"a prompt of {len(prompt)} tokens parts at {at} with a logit gap of {gap}"
        ties += 1
    print(f"{len(prompts)} prompts, {ties} parted at a tie below {TIE}")


def test_together_equals_transformers(
    oracle: transformers.PreTrainedModel, prompts: list[list[int]], together: list[list[int]]
) -> None:
    ties = 0
    for prompt, tokens in zip(prompts, together, strict=True):
        assert len(tokens) == NEW
        logits = logits_after(oracle, prompt, tokens)
        chosen = logits.gather(1, torch.tensor(tokens).unsqueeze(1)).squeeze(1)
        gaps = logits.amax(-1) - chosen
        assert float(gaps.max()) < TIE, f"a prompt of {len(prompt)} tokens: logit gap {float(gaps.max())}"
        ties += int((gaps > 0).sum())
    print(f"{len(prompts) * NEW} tokens equal but for {ties} at ties below {TIE}")


def test_alone_equals_together(
    model_folder: Path, oracle: transformers.PreTrainedModel, prompts: list[list[int]], together: list[list[int]]
) -> None:
    fleet = Fleet(model_folder, pages=4000, token_budget=512)
    alone = [fleet.generate([prompt])[0] for prompt in prompts]
    assert_same(oracle, prompts, alone, together)


def test_random_arrivals_in_chunks_of_64(
    model_folder: Path, oracle: transformers.PreTrainedModel, prompts: list[list[int]], together: list[list[int]]
) -> None:
    rng = random.Random(5)
    arrivals = [rng.randrange(200) for _ in prompts]
    assert_same(oracle, prompts, Fleet(model_folder, pages=4000, token_budget=64).generate(prompts, arrivals), together)


def test_preemption(
    model_folder: Path, oracle: transformers.PreTrainedModel, prompts: list[list[int]], together: list[list[int]]
) -> None:
    # All sequences at their ends need about 1,000 pages.
    fleet = Fleet(model_folder, pages=400, token_budget=512)
    got = fleet.generate(prompts)
    assert fleet.engine.stats().preemptions > 0
    assert_same(oracle, prompts, got, together)


def test_prefix_cache(
    model_folder: Path, oracle: transformers.PreTrainedModel, prompts: list[list[int]], together: list[list[int]]
) -> None:
    fleet = Fleet(model_folder, pages=4000, token_budget=512)
    assert_same(oracle, prompts, fleet.generate(prompts), together)
    before = fleet.engine.stats().cached_tokens
    got = fleet.generate(prompts)
    cached = fleet.engine.stats().cached_tokens - before
    assert cached > 0.9 * sum(len(prompt) - 16 for prompt in prompts if len(prompt) > 16)
    assert_same(oracle, prompts, got, together)
