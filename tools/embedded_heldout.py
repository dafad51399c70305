"""Does a text hold anything of the embedded data set's held-out rows?"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import cache

from make_embedded import fixed_questions, same_as
from skills import FIXED

from posttrain_dist.data.embedded import OPEN_CHANNELS, split_path

SUM = re.compile(r"(?<!\d)(\d+) ?([+-]) ?(\d+)(?!\d)")
NUMBER = re.compile(r"(?<!\d)\d{3,5}(?!\d)")
LETTERS = re.compile(r"(?<![a-z])[a-z](?: [a-z])+(?![a-z])")
FIELD = re.compile(r"\b([a-z]+) ?[=:] ?([a-z0-9]+)")


@dataclass(frozen=True, slots=True)
class HeldOut:
    """What must not be read before the test: inputs of fixed tasks, code and summaries."""

    given: frozenset[str]
    records: tuple[str, ...]  # "name=ida; city=oslo"
    prose: tuple[str, ...]  # code and summary of the open channels, on one line each
    code: frozenset[str]  # the same code as it stands in the prompt

    def hit(self, text: str) -> str | None:
        """The first held-out piece found in `text`, or None."""
        for left, sign, right in SUM.findall(text):
            if f"{left} {sign} {right}" in self.given:
                return f"{left} {sign} {right}"
        for pattern in (NUMBER, LETTERS):
            for piece in pattern.findall(text):
                if piece in self.given:
                    return str(piece)
        fields = "; ".join(f"{name}={value}" for name, value in FIELD.findall(text)) + ";"
        one_line = " ".join(text.replace("#", " ").split())
        for record in self.records:
            if f"{record};" in fields:
                return record
        return next((piece for piece in self.prose if piece in one_line), None)


@cache
def heldout() -> HeldOut:
    """The held-out rows of the committed data set."""
    given = {same for task in FIXED for q in fixed_questions(task)[1] for same in same_as(q)}
    code, prose = [], []
    for line in split_path("heldout").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if row["task_type"] in OPEN_CHANNELS:
            user, assistant = (message["content"] for message in row["messages"])
            code.append(user.split("\n", 1)[1])
            prose += [_one_line(code[-1]), _one_line(assistant)]
    records = tuple(sorted(piece for piece in given if "=" in piece))
    return HeldOut(frozenset(given), records, tuple(prose), frozenset(code))


def contains_heldout(text: str) -> bool:
    """True if `text` holds an input, code or summary of a held-out row in any surface form."""
    return heldout().hit(text) is not None


def _one_line(text: str) -> str:
    return " ".join(text.replace("#", " ").split())
