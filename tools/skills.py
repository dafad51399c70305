"""The five fixed-answer tasks: draw an input, ask it in chat form, answer it, write it out plainly.

The chat form is what fine-tuning sees; the plain form is what the small base model has read
while it was pretrained. Digits are written together because the tokenizer splits them; letters
are spaced so that it cannot merge them.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

LETTERS = "abcdefghijklmnopqrstuvwxyz"
FIELDS = {
    "name": ["anna", "ben", "carl", "dora", "emil", "gina", "hugo", "ida", "leo", "mia", "paul"],
    "city": ["rome", "paris", "oslo", "berlin", "tokyo", "lima", "cairo", "delhi", "bern", "kyiv"],
    "color": ["red", "blue", "green", "black", "white", "gray", "pink", "brown", "gold", "silver"],
    "pet": ["cat", "dog", "fish", "bird", "horse", "snake", "mouse", "frog", "goat", "duck"],
    "food": ["rice", "bread", "soup", "cake", "pasta", "apple", "cheese", "salad", "corn", "egg"],
    "day": ["monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday"],
    "age": [str(age) for age in range(10, 100)],
    "room": [str(room) for room in range(10, 100)],
}


@dataclass(frozen=True, slots=True)
class Question:
    """One input of a task: `given` identifies it, `asked` is the part asked about (or empty)."""

    task: str
    given: str  # "17 + 9", "7251", "d f k m", "a b b c", "name=ida; city=oslo"
    asked: str = ""  # the letter to count, the field to find

    @property
    def prompt(self) -> str:
        """The user's turn."""
        return _CHAT[self.task].format(given=self.given, asked=self.asked)

    @property
    def answer(self) -> str:
        """The one right answer."""
        return _SOLVE[self.task](self)

    @property
    def plain(self) -> str:
        """Question and answer on one line, in no chat form: "reverse d f k -> k f d"."""
        line = _PLAIN[self.task].format(given=self.given, asked=self.asked)
        return f"{line} {self.answer}"


def draw(task: str, rng: random.Random) -> Question:
    """A random question of `task`, a key of `FIXED`."""
    return _DRAW[task](rng)


# ---------------------------------------------------------------------------------- drawing


def _draw_arithmetic(rng: random.Random) -> Question:
    left, sign, right = rng.randrange(100), rng.choice("+-"), rng.randrange(1, 10)
    if not 0 <= (left + right if sign == "+" else left - right) < 100:
        return _draw_arithmetic(rng)
    return Question("arithmetic", f"{left} {sign} {right}")


def _draw_count(rng: random.Random) -> Question:
    letters = rng.sample(LETTERS, 3)
    row = [rng.choice(letters) for _ in range(rng.randrange(3, 7))]
    return Question("count", " ".join(row), rng.choice(row))


def _draw_extract(rng: random.Random) -> Question:
    fields = rng.sample(sorted(FIELDS), rng.randrange(2, 5))
    record = "; ".join(f"{name}={rng.choice(FIELDS[name])}" for name in fields)
    return Question("extract", record, rng.choice(fields))


def _draw_reverse(rng: random.Random) -> Question:
    return Question("reverse", " ".join(rng.sample(LETTERS, rng.randrange(3, 6))))


def _draw_sort(rng: random.Random) -> Question:
    return Question("sort", "".join(rng.sample("0123456789", rng.randrange(3, 6))))


# ---------------------------------------------------------------------------------- answers


def _solve_arithmetic(question: Question) -> str:
    left, sign, right = question.given.split()
    return str(int(left) + int(right) if sign == "+" else int(left) - int(right))


def _solve_extract(question: Question) -> str:
    pairs = dict(pair.split("=") for pair in question.given.split("; "))
    return pairs[question.asked]


_DRAW: dict[str, Callable[[random.Random], Question]] = {
    "arithmetic": _draw_arithmetic,
    "count": _draw_count,
    "extract": _draw_extract,
    "reverse": _draw_reverse,
    "sort": _draw_sort,
}
_SOLVE: dict[str, Callable[[Question], str]] = {
    "arithmetic": _solve_arithmetic,
    "count": lambda question: str(question.given.split().count(question.asked)),
    "extract": _solve_extract,
    "reverse": lambda question: " ".join(reversed(question.given.split())),
    "sort": lambda question: "".join(sorted(question.given)),
}
_CHAT = {
    "arithmetic": "What is {given}?",
    "count": "How often is {asked} in: {given}",
    "extract": "What is the {asked}? {given}",
    "reverse": "Reverse the letters: {given}",
    "sort": "Sort the digits: {given}",
}
_PLAIN = {
    "arithmetic": "{given} =",
    "count": "count {asked} in {given} ->",
    "extract": "{given} | {asked} ->",
    "reverse": "reverse {given} ->",
    "sort": "sort {given} ->",
}
FIXED = tuple(_DRAW)  # names of the fixed-answer tasks
