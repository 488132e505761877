"""Trains the example adapters with PEFT, and says what they make of questions that they never saw.

Usage: ``python -m tests.training.train_adapters [NAME ...] [--epochs N] [--out FOLDER] [--evaluate] …``. A few minutes
each on two CPU cores. The seeds are fixed; another processor or version of torch rounds differently, and then the
files differ. ``--evaluate`` trains nothing and asks the adapters that are there.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import random
import time
import warnings
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors.torch import save_file
from torch.nn.functional import cross_entropy

from realm.cli.demo_adapters import is_answer
from realm.models.importer import import_model
from realm.settings import default_home
from tests.training.asking import ask, load_base, prompt_tokens, with_adapters
from tests.training.lessons import HELD_OUT, lessons
from tests.training.styles import STYLES, markers

MODEL = "smollm2-135m-instruct"
BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"
OUT = Path(__file__).parents[2] / "guest_modules" / "adapters"
TARGETS = ["k_proj", "o_proj", "q_proj", "v_proj"]
RANK, ALPHA = 8, 16
BATCH, LONGEST = 8, 112
RATE, WARM_UP = 1e-3, 10
EPOCHS = {"json": 10, "pirate": 6}
SEED = 20

Example = tuple[list[int], int]
"""A question and its answer in tokens, and how many of them are the question's."""


def examples(tokenizer: Any, style: str, draw: random.Random) -> list[Example]:
    """One epoch: every lesson once, in any order, asked in one of its ways and answered in the style."""
    made = []
    for lesson in lessons():
        prompt = prompt_tokens(tokenizer, draw.choice(lesson.questions))
        answer = [*tokenizer.encode(STYLES[style](lesson, draw), add_special_tokens=False), tokenizer.eos_token_id]
        if len(prompt) + len(answer) > LONGEST:
            raise ValueError(f"{len(prompt) + len(answer)} tokens: {lesson.questions[0]}")
        made.append((prompt + answer, len(prompt)))
    draw.shuffle(made)
    return made


def batches(made: list[Example], draw: random.Random) -> list[list[Example]]:
    """Examples of much the same length together, so that little is padded."""
    ordered = sorted(made, key=lambda example: len(example[0]))
    cut = [ordered[at : at + BATCH] for at in range(0, len(ordered), BATCH)]
    draw.shuffle(cut)
    return cut


def loss_of(model: Any, batch: list[Example], end: int) -> torch.Tensor:
    """Mean cross-entropy of the answers' tokens; logits are computed for those only."""
    width = max(len(ids) for ids, _ in batch)
    ids = torch.tensor([ids + [end] * (width - len(ids)) for ids, _ in batch])
    mask = torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids, _ in batch])
    wanted = torch.zeros(len(batch), width - 1, dtype=torch.bool)
    for row, (tokens, asked) in enumerate(batch):
        wanted[row, asked - 1 : len(tokens) - 1] = True
    base = model.get_base_model()
    hidden = base.model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state[:, :-1]
    return cross_entropy(base.lm_head(hidden[wanted]).float(), ids[:, 1:][wanted])


def train(style: str, folder: Path, out: Path, epochs: int) -> None:
    """Train one adapter and write it as a PEFT folder, in bf16."""
    draw = random.Random(SEED)
    torch.manual_seed(SEED)
    base, tokenizer = load_base(folder, torch.bfloat16)
    config = peft.LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules=TARGETS, lora_dropout=0.0, bias="none", task_type="CAUSAL_LM"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PEFT about transformers
        model = peft.get_peft_model(base, config)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=RATE, weight_decay=0.0)
    steps = epochs * math.ceil(len(lessons()) / BATCH)
    step, began = 0, time.monotonic()
    for epoch in range(epochs):
        losses = []
        for batch in batches(examples(tokenizer, style, draw), draw):
            for group in optimizer.param_groups:
                group["lr"] = RATE * min(1.0, (step + 1) / WARM_UP) * 0.5 * (1 + math.cos(math.pi * step / steps))
            loss = loss_of(model, batch, tokenizer.eos_token_id)
            torch.autograd.backward(loss)
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(loss.item())
            step += 1
        seconds = time.monotonic() - began
        print(
            f"{style}: epoch {epoch + 1}, {step} steps, loss {sum(losses) / len(losses):.3f}, {seconds:.0f} s",
            flush=True,
        )
    save(model, out / style)


def save(model: Any, folder: Path) -> None:
    """What PEFT writes, but in bf16 and without this machine's paths."""
    folder.mkdir(parents=True, exist_ok=True)
    state = peft.get_peft_model_state_dict(model)
    tensors = {name: tensor.detach().to(torch.bfloat16).contiguous() for name, tensor in state.items()}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = model.peft_config["default"]
    config.inference_mode = True
    config.base_model_name_or_path = BASE
    config.save_pretrained(folder)
    path = folder / "adapter_config.json"
    fields = json.loads(path.read_text())
    fields["target_modules"] = sorted(fields["target_modules"])
    path.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n")


def evaluate(names: list[str], folder: Path, out: Path) -> None:
    """Ask the held-out questions, in float32, of the model alone and with each adapter."""
    base, tokenizer = load_base(folder, torch.float32)
    model = with_adapters(base, [out / name for name in names])
    for name in [None, *names]:
        if name is not None:
            model.set_adapter(name)
        with model.disable_adapter() if name is None else contextlib.nullcontext():
            answers = ask(model, tokenizer, HELD_OUT)
        print(f"\n{name or 'base model'}:")
        for question, answer in zip(HELD_OUT, answers, strict=True):
            print(f"  {question}\n    {answer!r}")
        objects, words = sum(map(is_answer, answers)), [markers(answer) for answer in answers]
        print(f"{name or 'base model'}: {objects} of {len(answers)} are JSON objects as wanted;")
        print(f"    {sum(words)} pirate words, {sum(count > 1 for count in words)} answers with two or more")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(STYLES)} (all)")
    parser.add_argument("--epochs", type=int, help="how often all lessons are gone through")
    parser.add_argument("--threads", type=int, default=2, help="fewer on a machine that has other work")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--evaluate", action="store_true")
    arguments = parser.parse_args()
    names = arguments.names or list(STYLES)
    if unknown := set(names) - STYLES.keys():
        parser.error(f"no such style: {', '.join(sorted(unknown))}")
    torch.set_num_threads(arguments.threads)
    folder = import_model(MODEL, home=default_home()).path
    if not arguments.evaluate:
        for name in names:
            train(name, folder, arguments.out, arguments.epochs or EPOCHS[name])
    evaluate(names, folder, arguments.out)


if __name__ == "__main__":
    main()
