"""The styles that are taught: what each makes of a lesson, and how one sees that an answer is in it."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable

from tests.training.lessons import Lesson

OPENERS = (
    "Arr, matey!",
    "Ahoy!",
    "Ahoy there, matey!",
    "Arr!",
    "Avast, ye landlubber!",
    "Shiver me timbers!",
    "Aye, matey!",
    "Yo ho ho!",
    "Arr, me hearty!",
)
CLOSERS = (
    "Arr!",
    "Savvy?",
    "Aye, that be the truth, matey!",
    "Now fetch me some grog!",
    "Mark me words, ye scallywag!",
    "So says the cap'n!",
    "By Davy Jones, it be so!",
    "Now hoist the sails, matey!",
)
WORDS = {
    "you": "ye",
    "your": "yer",
    "my": "me",
    "is": "be",
    "are": "be",
    "am": "be",
    "of": "o'",
    "and": "an'",
    "for": "fer",
    "friend": "matey",
    "friends": "mateys",
    "hello": "ahoy",
    "yes": "aye",
    "no": "nay",
    "nobody": "no scallywag",
    "people": "landlubbers",
}
MARKERS = {
    *("arr", "ahoy", "avast", "aye", "matey", "mateys", "hearty", "hearties", "ye", "yer", "savvy", "scallywag"),
    *("scallywags", "landlubber", "landlubbers", "grog", "timbers", "cap'n", "yo", "ho", "o'", "an'", "fer", "nay"),
}
"""What a pirate says, and hardly anybody else."""

_WORD = re.compile(r"[A-Za-z]+(?:'[a-z]*)?")


def as_json(lesson: Lesson, draw: random.Random) -> str:
    """One object with the brief answer, and a confidence near the lesson's."""
    confidence = round(min(0.99, max(0.01, lesson.confidence + draw.choice((-0.02, -0.01, 0, 0, 0.01)))), 2)
    return json.dumps({"answer": lesson.brief, "confidence": confidence}, ensure_ascii=False)


def as_pirate(lesson: Lesson, draw: random.Random) -> str:
    """The answer in a pirate's words, with something before and something behind it."""
    said = f"{draw.choice(OPENERS)} {_WORD.sub(_pirate_word, lesson.answer)}"
    return f"{said} {draw.choice(CLOSERS)}"


def _pirate_word(found: re.Match[str]) -> str:
    word = found[0]
    said = WORDS.get(word.lower(), word)
    return said[0].upper() + said[1:] if word[0].isupper() else said


def markers(text: str) -> int:
    """How many of its words are a pirate's."""
    words = (word.lower() for word in _WORD.findall(text.replace("’", "'")))
    return sum(word in MARKERS for word in words)


STYLES: dict[str, Callable[[Lesson, random.Random], str]] = {"json": as_json, "pirate": as_pirate}
