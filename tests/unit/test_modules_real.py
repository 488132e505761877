"""The committed guests with the real model, in one process: many runs at once in one runtime."""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from realm.adapters.made_up import CONFIG_FILE, TENSORS_FILE, write_random_adapter
from realm.engine.core import EngineCore
from realm.engine.loading import EngineOptions, load_engine
from realm.guests.abi import ErrorCode
from realm.guests.compiler import compile_module_sync
from realm.guests.facts import ModelFacts
from realm.guests.runtime import GuestRuntime
from realm.messages import AdapterFile, EngineReply
from realm.models.tokenizer import Tokenizer
from realm.run_messages import Output, RunFinished, RunLimits, StartRun
from tests.unit.test_modules_guests import BEST, CHAT, CONSTRAINED, GENERATE, GRAMMAR, PATHS


@dataclass
class Bench:
    """A loaded engine with all that a runtime needs."""

    engine: EngineCore
    tokenizer: Tokenizer
    facts: ModelFacts
    cache: Path
    workers: int = 0

    def run(self, jobs: list[tuple[Path, str, int]], outcome: str = "complete") -> list[tuple[int, str]]:
        """Run (module, input, seed) jobs side by side; code and text of each. All must end in this way."""
        self.workers += 1
        runtime = GuestRuntime(self.workers, self.tokenizer, self.facts)
        for number, (wasm, text, seed) in enumerate(jobs):
            module = compile_module_sync(wasm, self.cache)
            path, sha256 = str(module.artifact), module.artifact_sha256
            message = StartRun(number, "t", wasm.stem, path, text.encode(), seed, RunLimits(), 1 << 20, sha256)
            runtime.start(message)
        output = [b""] * len(jobs)
        codes: dict[int, int] = {}
        replies = 0
        while len(codes) < len(jobs):
            turn = runtime.turn(time.monotonic())
            self.engine.submit(self.workers, turn.ops)
            for event in turn.events:
                if isinstance(event, Output):
                    output[event.run] += event.data
                elif isinstance(event, RunFinished):
                    assert event.outcome == outcome, event.error
                    codes[event.run] = event.code
            self.engine.advance()
            # The engine steps when every guest waits for it, so that a step serves them all.
            if not turn.busy and self.engine.has_work():
                replies += 1
                runtime.deliver(EngineReply(replies, self.engine.step().get(self.workers, [])))
        runtime.close()
        return [(codes[number], text.decode()) for number, text in enumerate(output)]


@pytest.fixture(scope="module")
def bench(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    # One thread: several of them wait for each other wherever the machine is busy with something else.
    threads = torch.get_num_threads()
    tokenizer = Tokenizer(model_folder)
    facts = ModelFacts.load(model_folder, bos=tokenizer.bos, eos=tokenizer.eos)
    engine = load_engine(model_folder, EngineOptions(dtype="float32", pages=512, threads=1))
    # The tenant's own adapter, one of everybody's, and one of another tenant's.
    for number, (tenant, name) in enumerate([("t", "légal"), ("", "poet"), ("u", "secret")]):
        folder = tmp_path_factory.mktemp("adapter")
        write_random_adapter(folder, engine.config, rank=8 << number, seed=number, scale=0.04)
        file = folder / TENSORS_FILE
        sha256, config = hashlib.sha256(file.read_bytes()).hexdigest(), (folder / CONFIG_FILE).read_bytes()
        engine.adapters.register(AdapterFile(tenant, name, str(file), sha256, config))
    yield Bench(engine, tokenizer, facts, tmp_path_factory.mktemp("compiled"))
    engine.close()
    torch.set_num_threads(threads)


def test_constrained_matches_its_grammar_hot(bench: Bench) -> None:
    ran = bench.run([(CONSTRAINED, '{"temperature": 1.5}', seed) for seed in range(20)])
    for code, text in ran:
        assert code == 0
        assert re.fullmatch(GRAMMAR, text), text
    assert len(set(ran)) == 20


def test_constrained_samplers_agree_when_greedy(bench: Bench) -> None:
    """With either sampler the most likely allowed token is the same one."""
    inputs = [json.dumps({"temperature": 0, "sampler": sampler}) for sampler in ("guest", "engine", "both")]
    ran = bench.run([(CONSTRAINED, text, 1) for text in inputs])
    assert len(set(ran)) == 1
    assert re.fullmatch(GRAMMAR, ran[0][1])


def test_generate_and_chat_agree_when_greedy(bench: Bench) -> None:
    options = json.dumps({"prompt": "What is the capital of France?", "max_tokens": 12, "temperature": 0, "top_p": 1})
    one, two = bench.run([(GENERATE, options, 1), (CHAT, options, 2)])
    assert one == two
    assert "Paris" in one[1]


def test_best_of_n_ranks_real_answers(bench: Bench) -> None:
    [(code, text)] = bench.run([(BEST, '{"prompt": "Name a colour.", "n": 3, "max_tokens": 8}', 1)])
    assert code == 0
    rows = [line.split("  ") for line in text.rsplit("\n\n", 1)[1].splitlines()[1:]]
    scores = [float(row[1]) for row in rows]
    assert len(scores) == 3 and scores == sorted(scores, reverse=True) and scores[-1] < 0


def test_ab_test_gives_what_each_adapter_gives_alone(bench: Bench) -> None:
    options = {"prompt": "Name a colour.", "max_tokens": 12}
    adapters = {"a": "légal", "b": "poet", "base": None}
    alone = {
        arm: bench.run([(GENERATE, json.dumps({**options, "adapter": name}), 1)])[0][1]
        for arm, name in adapters.items()
    }
    assert len(set(alone.values())) == 3
    job = PATHS["ab_test"], json.dumps({**options, "a": "légal", "b": "poet"}), 1
    # Beside others that have one of the adapters, or none.
    others = [(GENERATE, json.dumps({**options, "adapter": name}), 1) for name in adapters.values()]
    (code, text), *beside = bench.run([job, *others])
    found = json.loads(text)["answers"]
    assert code == 0
    assert {answer["name"]: answer["text"] for answer in found} == alone
    assert {answer["name"]: answer["adapter"] for answer in found} == adapters
    scores = [answer["mean_logprob"] for answer in found]
    assert scores == sorted(scores, reverse=True) and scores[-1] < 0
    assert [ran[1] for ran in beside] == list(alone.values())
    bench.engine.check()


@pytest.mark.parametrize("name", ["secret", "Poet", "t/légal"])
def test_an_adapter_of_another_tenant_is_one_that_there_is_not(bench: Bench, name: str) -> None:
    job = GENERATE, json.dumps({"prompt": "Name a colour.", "adapter": name}), 1
    assert bench.run([job], "error") == [(ErrorCode.NOT_FOUND, "")]
