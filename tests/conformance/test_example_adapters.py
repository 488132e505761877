"""What the committed example adapters make of questions they never saw, with PEFT and transformers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from realm.cli.demo_adapters import is_answer
from tests.training.asking import ask, load_base, with_adapters
from tests.training.lessons import HELD_OUT
from tests.training.styles import markers
from tests.training.train_adapters import OUT

pytestmark = pytest.mark.conformance

# Of every kind, and few enough for a slow machine; guest_modules/adapters/README.md has all twenty.
QUESTIONS = HELD_OUT[::3]


@pytest.fixture(scope="module")
def loaded(model_folder: Path) -> Iterator[tuple[Any, Any]]:
    """Model and tokenizer; the model has both adapters."""
    base, tokenizer = load_base(model_folder, torch.float32)
    yield with_adapters(base, [OUT / "json", OUT / "pirate"]), tokenizer


def test_the_model_alone_has_neither_style(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    with model.disable_adapter():
        answers = ask(model, tokenizer, QUESTIONS, 32)
    assert all(answer.strip() for answer in answers)
    assert not any(is_answer(answer) or markers(answer) for answer in answers), answers


def test_with_json_the_answer_is_one_object(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    model.set_adapter("json")
    answers = ask(model, tokenizer, QUESTIONS)
    # Rounding differs between processors, so one of them may come out otherwise.
    assert sum(map(is_answer, answers)) >= len(QUESTIONS) - 1, answers


def test_with_pirate_the_answer_is_a_pirates(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    model.set_adapter("pirate")
    answers = ask(model, tokenizer, QUESTIONS, 40)
    assert sum(markers(answer) > 0 for answer in answers) >= len(QUESTIONS) - 1, answers
    assert sum(map(markers, answers)) >= 2 * len(QUESTIONS), answers
    assert not any(map(is_answer, answers))
