"""Adapters against PEFT and transformers, float32: logits and greedy tokens, alone and with others in a batch.

The difference of two sets of logits is their largest absolute difference divided by the largest logit of
PEFT's, over all positions compared: where a sequence's tokens were drawn from. Greedy tokens are
teacher-forced, as in ``test_greedy``: PEFT's pass over prompt and our tokens must have our token as its arg max.

Adapters are made by PEFT, saved by PEFT, and read as a user's are.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import peft
import pytest
import torch
import transformers

from realm.adapters.made_up import CONFIG_FILE, TENSORS_FILE
from realm.adapters.peft import check_adapter, parse_config
from realm.adapters.weights import load_adapter
from realm.engine.batch import Chunk, Decodes, StepBatch
from realm.engine.runners.cpu import CpuRunner
from realm.engine.sampling import draws_of
from realm.messages import SamplingParams
from realm.models.config import ModelConfig
from realm.models.llama import LlamaModel
from realm.models.loading import load_weights
from realm.models.tokenizer import Tokenizer
from tests.tiny import make_model

DIFFERENCE = 1e-4
TIE = 1e-4
RANKS = (1, 4, 16, 64, 256)
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SUBSETS = [chosen for size in range(1, 8) for chosen in itertools.combinations(TARGETS, size)]
DOZEN = [
    *((target,) for target in ("q_proj", "v_proj", "o_proj", "down_proj")),
    ("q_proj", "v_proj"),
    ("k_proj", "up_proj"),
    TARGETS[:3],
    TARGETS[:4],
    TARGETS[4:],
    ("v_proj", "o_proj", "gate_proj", "down_proj"),
    ("q_proj", "k_proj", "o_proj", "up_proj", "down_proj"),
    TARGETS,
]
ADAPTERS = 3
"""Different random adapters; each subset and rank has one of them."""
TRAINED = [Path(__file__).parents[2] / "guest_modules" / "adapters" / name for name in ("json", "pirate")]
"""Folders of adapters that were trained for the real model."""

LANES, WIDTH = 12, 4
PROMPTS = [
    "The otter is an animal that",
    "Write a haiku about the sea.",
    "def fibonacci(n):",
    "In 1969, two people",
    "List three colours: red,",
]

pytestmark = [
    pytest.mark.conformance,
    pytest.mark.timeout(600),
    # The passes are short: more threads would mostly wait for each other, long on a busy machine.
    pytest.mark.usefixtures("one_thread"),
    # transformers' own, of a name that PEFT asks for.
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
]


class Case(NamedTuple):
    """An adapter to be made. ``number``: which of :data:`ADAPTERS`."""

    targets: tuple[str, ...]
    rank: int
    number: int

    @property
    def name(self) -> str:
        return f"{'-'.join(target.removesuffix('_proj') for target in self.targets)}_r{self.rank}_{self.number}"


def real_cases() -> list[Case]:
    """Each of the dozen with two ranks, and all targets with all ranks."""
    pairs = [(subset, RANKS[(at + step) % 5]) for at, subset in enumerate(DOZEN) for step in (0, 2)]
    pairs += [(TARGETS, rank) for rank in RANKS if (TARGETS, rank) not in pairs]
    return [Case(subset, rank, at % ADAPTERS) for at, (subset, rank) in enumerate(pairs)]


def lora(case: Case, **more: Any) -> peft.LoraConfig:
    """Both matrices random, so that B @ A has a third of a freshly made layer's scale; the scaling is 1, 2 or 0.5."""
    alpha = case.rank * (1, 2, 0.5)[case.number]
    targets = list(case.targets)
    return peft.LoraConfig(
        task_type="CAUSAL_LM", r=case.rank, lora_alpha=alpha, target_modules=targets, init_lora_weights=False, **more
    )


class Ours:
    """A model on the CPU runner; sequence i has lane i."""

    def __init__(self, folder: Path) -> None:
        config = ModelConfig.load(folder)
        weights = load_weights(folder, config, dtype=torch.float32, device=torch.device("cpu"), progress=None)
        with torch.inference_mode():
            model = LlamaModel(config, weights)
        self.config = config
        self.runner = CpuRunner(model, pages=LANES * WIDTH, lanes=LANES, adapter_memory=1 << 30)
        self._tables = np.arange(LANES * WIDTH, dtype=np.int32).reshape(LANES, WIDTH)

    def put(self, slot: int, folder: Path, at: int) -> int:
        """Load a PEFT folder as a user's is, behind ``at``. Returns where the next may begin."""
        config = parse_config((folder / CONFIG_FILE).read_bytes())
        check_adapter(folder / TENSORS_FILE, config, self.config)
        weights = load_adapter(folder / TENSORS_FILE, config, self.config, torch.float32)
        self.runner.adapters.put(slot, at, weights)
        return at + -(-weights.nbytes // 256) * 256

    def greedy(
        self, prompts: list[list[int]], slots: list[int], count: int, starts: list[int] | None = None
    ) -> tuple[list[list[int]], torch.Tensor]:
        """``count`` tokens of each sequence and the logits that they were drawn from, [sequences, count, vocab].

        ``starts``: the step in which each prompt is computed; then and later the others decode beside it.
        """
        starts = starts or [0] * len(prompts)
        tokens: list[list[int]] = [[] for _ in prompts]
        logits: list[list[torch.Tensor]] = [[] for _ in prompts]
        for step in range(max(starts) + count):
            decoding = [i for i in range(len(prompts)) if starts[i] < step < starts[i] + count]
            starting = [i for i in range(len(prompts)) if starts[i] == step]
            lengths = [len(prompts[i]) + len(tokens[i]) for i in decoding]
            decodes = Decodes(
                np.array(decoding, np.int32),
                np.array([tokens[i][-1] for i in decoding], np.int32),
                np.array(lengths, np.int32) - 1,
                self._tables,
                max(lengths, default=0),
            )
            chunks = [Chunk(np.array(prompts[i], np.uint32), 0, self._tables[i].tolist(), True, i) for i in starting]
            order = [*decoding, *starting]
            batch = StepBatch(decodes, chunks, draws_of([SamplingParams()] * len(order)), list(range(len(order))))
            batch.adapters = np.array([slots[i] for i in order], np.int32)
            result = self.runner.launch(batch).wait()
            assert result.logits is not None
            for row, i in enumerate(order):
                tokens[i].append(int(result.tokens[row]))
                logits[i].append(torch.from_numpy(np.array(result.logits[row])))
        return tokens, torch.stack([torch.stack(own) for own in logits])


@torch.inference_mode()
def logits_after(model: Any, prompt: list[int], tokens: list[int]) -> torch.Tensor:
    """PEFT's logits [len(tokens), vocab] from which each of ``tokens`` should have been drawn."""
    got: torch.Tensor = model(torch.tensor([prompt + tokens[:-1]]), logits_to_keep=len(tokens)).logits[0].float()
    return got


def assert_same(tokens: list[int], ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Returns the difference."""
    difference = float((ours - theirs).abs().max() / theirs.abs().max())
    assert difference <= DIFFERENCE
    gaps = theirs.amax(-1) - theirs.gather(1, torch.tensor(tokens).unsqueeze(1)).squeeze(1)
    assert float(gaps.max()) < TIE, "a greedy token that is not PEFT's"
    return difference


# --- the real model -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real(model_folder: Path) -> Ours:
    return Ours(model_folder)


@pytest.fixture(scope="module")
def prompts(model_folder: Path) -> list[list[int]]:
    tokenizer = Tokenizer(model_folder)
    return [tokenizer.encode(text, special=False) for text in PROMPTS]


@pytest.fixture(scope="module")
def base(model_folder: Path) -> transformers.PreTrainedModel:
    return transformers.LlamaForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def real_adapters(base: transformers.PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """PEFT's model with all cases as named adapters, and the folder in which it has saved each."""
    torch.manual_seed(21)
    model = None
    for case in real_cases():
        if model is None:
            model = peft.get_peft_model(base, lora(case), adapter_name=case.name)
        else:
            model.add_adapter(case.name, lora(case))
    assert model is not None
    folder = tmp_path_factory.mktemp("adapters")
    model.save_pretrained(folder, save_embedding_layers=False)
    yield model.eval(), folder


@pytest.mark.parametrize("case", real_cases(), ids=lambda case: case.name)
def test_alone(case: Case, real: Ours, real_adapters: Any, prompts: list[list[int]]) -> None:
    model, folder = real_adapters
    real.put(0, folder / case.name, 0)
    prompt = prompts[case.number]
    ((tokens,), (ours,)) = real.greedy([prompt], [0], 6)
    model.set_adapter(case.name)
    theirs = logits_after(model, prompt, tokens)
    assert_same(tokens, ours, theirs)
    with model.disable_adapter():
        plain = logits_after(model, prompt, tokens)
    assert (plain - theirs).abs().max() > 0.05, "the adapter changes nothing: this tests nothing"


def test_eight_adapters_and_the_base_model_in_one_batch(
    real: Ours, real_adapters: Any, prompts: list[list[int]]
) -> None:
    """Prompts of some beside decoding rows of others."""
    model, folder = real_adapters
    # Of every rank, and of few and many targets.
    cases = [real_cases()[at] for at in (1, 5, 6, 9, 14, 17, 23, 26)]
    assert {case.rank for case in cases} == {*RANKS}
    at = 0
    for slot, case in enumerate(cases):
        at = real.put(slot, folder / case.name, at)
    slots = [0, 1, -1, 2, 3, 4, -1, 5, 6, 7, 0, 3]
    texts = [prompts[lane % len(prompts)] for lane in range(LANES)]
    tokens, ours = real.greedy(texts, slots, 8, [lane % 4 for lane in range(LANES)])
    for lane, slot in enumerate(slots):
        if slot < 0:
            with model.disable_adapter():
                theirs = logits_after(model, texts[lane], tokens[lane])
        else:
            model.set_adapter(cases[slot].name)
            theirs = logits_after(model, texts[lane], tokens[lane])
        assert_same(tokens[lane], ours[lane], theirs)
    assert len({tuple(own) for own in tokens}) > len(prompts)


def test_trained(real: Ours, real_adapters: Any, prompts: list[list[int]]) -> None:
    """Each alone, then all and the base model in one batch."""
    model, _ = real_adapters
    at = 0
    for slot, folder in enumerate(TRAINED):
        at = real.put(slot, folder, at)
        model.load_adapter(str(folder), folder.name)
        model.set_adapter(folder.name)
        ((tokens,), (ours,)) = real.greedy([prompts[1]], [slot], 16)
        assert_same(tokens, ours, logits_after(model, prompts[1], tokens))
    slots = [lane % (len(TRAINED) + 1) - 1 for lane in range(LANES)]
    texts = [prompts[lane // (len(TRAINED) + 1)] for lane in range(LANES)]
    drawn, logits = real.greedy(texts, slots, 16)
    for lane, slot in enumerate(slots):
        if slot < 0:
            with model.disable_adapter():
                theirs = logits_after(model, texts[lane], drawn[lane])
        else:
            model.set_adapter(TRAINED[slot].name)
            theirs = logits_after(model, texts[lane], drawn[lane])
        assert_same(drawn[lane], logits[lane], theirs)
    assert len({tuple(own) for own in drawn}) == LANES


# --- all subsets, on a tiny model -----------------------------------------------------------------


@pytest.mark.parametrize("rank", RANKS)
def test_all_subsets_on_a_tiny_model(rank: int, tmp_path: Path) -> None:
    """All 127 subsets of the targets, each alone; then in batches of twelve."""
    base = make_model(tmp_path / "model", num_hidden_layers=2)
    ours = Ours(tmp_path / "model")
    torch.manual_seed(rank)
    prompt, count = [5, 17, 40, 3, 77], 3
    alone: list[tuple[list[int], torch.Tensor]] = []
    at, model = 0, None
    for slot, subset in enumerate(SUBSETS):
        case = Case(subset, rank, slot % ADAPTERS)
        model = peft.get_peft_model(base, lora(case)).eval()
        folder = tmp_path / "adapter"
        model.save_pretrained(folder, save_embedding_layers=False)
        at = ours.put(slot, folder, at)
        ((tokens,), (logits,)) = ours.greedy([prompt], [slot], count)
        theirs = logits_after(model, prompt, tokens)
        assert_same(tokens, logits, theirs)
        alone.append((tokens, theirs))
        base = model.unload()
    for first in range(0, len(SUBSETS), LANES - 1):
        slots = [-1, *range(first, min(first + LANES - 1, len(SUBSETS)))]
        tokens, logits = ours.greedy([prompt] * len(slots), slots, count)
        for row, slot in enumerate(slots):
            if slot < 0:
                assert_same(tokens[row], logits[row], logits_after(base, prompt, tokens[row]))
            else:
                assert tokens[row] == alone[slot][0]
                assert_same(tokens[row], logits[row], alone[slot][1])
