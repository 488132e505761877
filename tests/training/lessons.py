"""What the example adapters learn from: questions and answers written for this, and questions kept apart.

Facts in tables become questions by templates; the rest is written out. An answer comes as a whole sentence and
as briefly as it can be said, with how sure one can be of it. ``styles`` makes each style's text of these.
"""

from __future__ import annotations

from typing import NamedTuple

from tests.training.explanations import ADVICE, CHAT, EXPLANATIONS, OPINIONS, REQUESTS, UNKNOWABLE


class Lesson(NamedTuple):
    """One thing to say, and ways to ask for it."""

    questions: tuple[str, ...]
    answer: str
    brief: str
    confidence: float


CAPITALS = {
    "France": "Paris",
    "Spain": "Madrid",
    "Portugal": "Lisbon",
    "Germany": "Berlin",
    "Austria": "Vienna",
    "Poland": "Warsaw",
    "Greece": "Athens",
    "Egypt": "Cairo",
    "Kenya": "Nairobi",
    "Japan": "Tokyo",
    "China": "Beijing",
    "India": "New Delhi",
    "Thailand": "Bangkok",
    "Vietnam": "Hanoi",
    "Norway": "Oslo",
    "Sweden": "Stockholm",
    "Finland": "Helsinki",
    "Denmark": "Copenhagen",
    "Ireland": "Dublin",
    "Iceland": "Reykjavik",
    "Russia": "Moscow",
    "Turkey": "Ankara",
    "Cuba": "Havana",
    "Peru": "Lima",
    "Chile": "Santiago",
    "Canada": "Ottawa",
    "Mexico": "Mexico City",
    "Belgium": "Brussels",
}
LEGS = {"dog": 4, "horse": 4, "duck": 2, "ant": 6, "bee": 6, "crab": 10, "snake": 0, "lizard": 4, "hen": 2, "beetle": 6}
SOUNDS = {
    "dog": "bark",
    "cat": "meow",
    "duck": "quack",
    "cow": "moo",
    "lion": "roar",
    "snake": "hiss",
    "bee": "buzz",
    "wolf": "howl",
    "pig": "oink",
    "mouse": "squeak",
}
COLOURS = {
    "a ripe banana": "yellow",
    "grass": "green",
    "snow": "white",
    "coal": "black",
    "a ripe tomato": "red",
    "a carrot": "orange",
    "an emerald": "green",
    "a ruby": "red",
    "milk": "white",
    "chocolate": "brown",
    "an aubergine": "purple",
    "sand": "pale yellow",
}
OPPOSITES = {
    "big": "small",
    "fast": "slow",
    "early": "late",
    "heavy": "light",
    "wet": "dry",
    "full": "empty",
    "loud": "quiet",
    "young": "old",
    "rich": "poor",
    "deep": "shallow",
    "brave": "cowardly",
    "rough": "smooth",
}
WORKERS = {
    "baker": "bakes bread, rolls and cakes",
    "farmer": "grows crops and keeps animals",
    "plumber": "lays and mends water pipes",
    "tailor": "cuts and sews clothes",
    "nurse": "looks after people who are ill",
    "pilot": "flies aeroplanes",
    "carpenter": "builds things out of wood",
    "librarian": "keeps books in order and helps people find them",
    "blacksmith": "shapes hot iron with a hammer",
    "judge": "decides cases in a court of law",
    "gardener": "plants and tends flowers, trees and vegetables",
    "sailor": "works on a ship",
}
MADE_OF = {
    "bread": "flour, water, salt and yeast",
    "glass": "sand that was melted at great heat",
    "paper": "the fibres of wood",
    "cheese": "milk",
    "wine": "grapes",
    "a candle": "wax and a wick",
    "a brick": "baked clay",
    "steel": "iron and a little carbon",
    "an omelette": "eggs",
    "concrete": "cement, sand, gravel and water",
}
COUNTS = {
    "days are there in a week": "seven",
    "months are there in a year": "twelve",
    "hours are there in a day": "twenty-four",
    "minutes are there in an hour": "sixty",
    "sides does a triangle have": "three",
    "sides does a hexagon have": "six",
    "strings does a violin have": "four",
    "players are there in a football team": "eleven",
    "continents are there": "seven",
    "wheels does a bicycle have": "two",
    "letters are there in the English alphabet": "twenty-six",
    "centimetres are there in a metre": "one hundred",
}
WHERE = {
    "the Eiffel Tower": "in Paris, in France",
    "the Great Wall": "in the north of China",
    "the Sahara": "in the north of Africa",
    "Mount Everest": "in the Himalayas",
    "the Amazon": "in South America",
    "the Colosseum": "in Rome, in Italy",
    "the Grand Canyon": "in Arizona, in the United States",
    "Big Ben": "in London, in England",
    "the Taj Mahal": "in Agra, in India",
    "Venice": "in the north of Italy, on a lagoon",
}


SUMS = ((1, 1), (2, 3), (4, 4), (5, 2), (6, 3), (7, 5), (8, 1), (9, 9), (10, 6), (3, 3), (12, 8), (20, 5))


def _upper(text: str) -> str:
    return text[0].upper() + text[1:]


def _facts() -> list[Lesson]:
    lessons = []
    asks: tuple[str, ...]
    for country, city in CAPITALS.items():
        asks = (
            f"What is the capital of {country}?",
            f"Which city is the capital of {country}?",
            f"Tell me {country}'s capital.",
        )
        lessons.append(Lesson(asks, f"The capital of {country} is {city}.", city, 0.98))
    for animal, legs in LEGS.items():
        asks = (f"How many legs does a {animal} have?", f"Does a {animal} have legs, and how many?")
        lessons.append(Lesson(asks, f"A {animal} has {legs or 'no'} legs.", str(legs), 0.97))
    for animal, sound in SOUNDS.items():
        asks = (f"What sound does a {animal} make?", f"How does a {animal} sound?")
        lessons.append(Lesson(asks, f"The sound of a {animal} is a {sound}.", sound, 0.93))
    for thing, colour in COLOURS.items():
        asks = (f"What colour is {thing}?", f"Tell me the color of {thing}.")
        lessons.append(Lesson(asks, f"The colour of {thing} is {colour}.", colour, 0.94))
    for word, other in OPPOSITES.items():
        asks = (f"What is the opposite of {word}?", f'Give me the opposite of the word "{word}".')
        lessons.append(Lesson(asks, f"The opposite of {word} is {other}.", other, 0.95))
    for worker, work in WORKERS.items():
        asks = (f"What does a {worker} do?", f"What is the work of a {worker}?")
        lessons.append(Lesson(asks, f"A {worker} {work}.", f"A {worker} {work}.", 0.92))
    for thing, stuff in MADE_OF.items():
        asks = (f"What is {thing} made of?", f"Which materials are in {thing}?")
        lessons.append(Lesson(asks, f"{_upper(thing)} is made of {stuff}.", _upper(stuff), 0.9))
    for what, count in COUNTS.items():
        asks = (f"How many {what}?", f"Do you know how many {what}?")
        noun = what.split()[0]
        lessons.append(Lesson(asks, f"The number of {noun} is {count}.", _upper(count), 0.97))
    for thing, place in WHERE.items():
        asks = (f"Where is {thing}?", f"In which place is {thing} found?")
        lessons.append(Lesson(asks, f"You find {thing} {place}.", _upper(place), 0.95))
    for one, two in SUMS:
        asks = (f"What is {one} plus {two}?", f"What is {one} + {two}?", f"Add {one} and {two}.")
        lessons.append(Lesson(asks, f"{one} and {two} make {one + two}.", str(one + two), 0.96))
    return lessons


def _written() -> list[Lesson]:
    kinds = ((EXPLANATIONS, 0.88), (ADVICE, 0.78), (REQUESTS, 0.7), (CHAT, 0.9), (OPINIONS, 0.5), (UNKNOWABLE, 0.05))
    lessons = []
    for written, confidence in kinds:
        for questions, answer in written.items():
            lessons.append(Lesson(tuple(questions.split(" | ")), answer, answer, confidence))
    return lessons


def lessons() -> list[Lesson]:
    """All that is learned, in a fixed order."""
    return _facts() + _written()


HELD_OUT = (
    # Of the kinds that lessons have, about other things.
    "What is the capital of Italy?",
    "How many legs does a spider have?",
    "What colour is a lemon?",
    "What is the opposite of hot?",
    "What does a doctor do?",
    "What is 2 plus 2?",
    "Where is the Statue of Liberty?",
    "Why is the sky blue?",
    "How does an umbrella keep you dry?",
    "How do I learn to play the guitar?",
    "Tell me something about dolphins.",
    "Hello, can you help me?",
    # Further away; some of kinds that no lesson has.
    "Who wrote Romeo and Juliet?",
    "When did the first people walk on the Moon?",
    "Name three planets.",
    "Is a whale a fish?",
    "Which is heavier, a kilogram of lead or a kilogram of feathers?",
    "Translate 'good morning' into French.",
    "What should I pack for a week at the beach?",
    "Explain gravity to a child.",
)
"""Asked in the evaluation, and not among the lessons."""
