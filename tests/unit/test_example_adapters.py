"""The committed example adapters as files, and the lessons they were made from. What they do: tests/conformance."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import pytest

from realm.adapters.peft import check_adapter, parse_config
from realm.cli.demo_adapters import is_answer
from realm.models.config import ModelConfig
from tests.training.lessons import HELD_OUT, Lesson, lessons
from tests.training.styles import STYLES, as_json, as_pirate, markers
from tests.training.train_adapters import BASE, OUT, RANK, TARGETS

LESSON = Lesson(("Who?",), "Ann is my friend, and you know the way of it.", 'Ann, "the" friend', 0.98)


@pytest.fixture(scope="module")
def model(model_folder: Path) -> ModelConfig:
    return ModelConfig.load(model_folder)


@pytest.mark.parametrize("name", STYLES)
def test_the_files_pass_the_check(name: str, model: ModelConfig) -> None:
    config = parse_config((OUT / name / "adapter_config.json").read_bytes())
    info = check_adapter(OUT / name / "adapter_model.safetensors", config, model)
    assert (info.rank, info.layers, sorted(info.targets)) == (RANK, model.layers, TARGETS)
    assert info.parameters == 921_600


@pytest.mark.parametrize("name", STYLES)
def test_the_files_are_small_and_name_no_machine(name: str) -> None:
    assert (OUT / name / "adapter_model.safetensors").stat().st_size < 2_000_000
    text = (OUT / name / "adapter_config.json").read_text()
    assert json.loads(text)["base_model_name_or_path"] == BASE
    assert re.findall(r'"[^"]*/[^"]*"', text) == [f'"{BASE}"']


def test_every_adapter_has_its_style() -> None:
    assert {path.name for path in OUT.iterdir() if path.is_dir()} == set(STYLES)


def test_held_out_questions_are_not_among_the_lessons() -> None:
    def plain(text: str) -> str:
        return re.sub(r"\W+", " ", text.lower()).strip()

    asked = {plain(question) for lesson in lessons() for question in lesson.questions}
    assert len(lessons()) > 200 and len(asked) > 400
    assert len({plain(question) for question in HELD_OUT} - asked) == len(HELD_OUT) == 20


@pytest.mark.parametrize("seed", range(4))
def test_every_lesson_can_be_said_in_every_style(seed: int) -> None:
    draw = random.Random(seed)
    for lesson in lessons():
        assert is_answer(as_json(lesson, draw)), lesson
        assert markers(as_pirate(lesson, draw)), lesson
        assert not markers(lesson.answer) and not is_answer(lesson.answer), lesson


def test_a_lesson_in_each_style() -> None:
    assert json.loads(as_json(LESSON, random.Random(0)))["answer"] == 'Ann, "the" friend'
    assert "Ann be me matey, an' ye know the way o' it." in as_pirate(LESSON, random.Random(0))


@pytest.mark.parametrize(
    "text",
    [
        *("", "Paris", "[]", "{}", '{"answer": "Paris"}', '{"answer": "Paris", "confidence": 1.5}'),
        *(
            '{"answer": 4, "confidence": 0.5}',
            '{"answer": "4", "confidence": "high"}',
            '{"answer": "4", "confidence": true}',
        ),
        *('{"answer": "4", "confidence": 0.5} ok', '{"answer": "4", "confidence": NaN}'),
        '{"answer": "4", "confidence": 0.5, "more": 1}',
    ],
)
def test_what_is_no_answer_in_json(text: str) -> None:
    assert is_answer('{"answer": "Paris", "confidence": 0.9}') and is_answer('{"answer": "", "confidence": 1}')
    assert not is_answer(text)
