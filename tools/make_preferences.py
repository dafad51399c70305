"""Make the embedded preferences: `python tools/make_preferences.py [FOLDER]`.

Two natures, in channels of their own:

    arithmetic count extract reverse sort   the right answer against a plausible mistake, which is
                                            about as long
    concise                                 what a function or class does, in its own words against
                                            a wordy way to say it

Length decides in neither: of the wordy answers half are not longer, because they say less. No
question stands in the other split, nor a training question among the held-out rows that
tools/make_embedded.py makes. The rows come out the same everywhere, given the committed embedded
data. Prints the digests that `data/embedded.py` pins.
"""

from __future__ import annotations

import hashlib
import json
import random
import sys
from collections.abc import Callable
from pathlib import Path

from make_embedded import FOLDER, fixed_questions, same_as
from skills import FIXED, Question, draw

NUM_TRAIN, NUM_HELDOUT = 210, 40  # of each task
NUM_CONCISE = {"train": 450, "heldout": 60}
OPENINGS = (
    *("Well, ", "So, ", "Basically, ", "To put it simply, ", "In other words, ", "I think that "),
    *("As far as I can tell, ", "If I see it right, ", "It looks like this: "),
)
SHORT = OPENINGS[:3]  # of answers that say less
LESS = 0.6  # their share of the characters, so that they have fewer tokens too
ENDINGS = ("", " I hope this helps.", " That is about all.", " Just ask if you need more.")


def wrong_answer(question: Question, rng: random.Random) -> str:
    """What someone might answer who makes a mistake."""
    while True:
        answer = _MISTAKES[question.task](question, rng)
        if answer != question.answer:
            return answer


def _wrong_sum(question: Question, rng: random.Random) -> str:
    left, sign, right = question.given.split()
    other_sign = int(left) - int(right) if sign == "+" else int(left) + int(right)
    right_one = int(question.answer)
    near = [right_one + step for step in (-10, -2, -1, 1, 2, 10)]
    return str(rng.choice([number for number in (*near, other_sign) if 0 <= number < 110]))


def _wrong_count(question: Question, rng: random.Random) -> str:
    right_one = int(question.answer)
    return str(rng.choice([right_one - 1, right_one + 1, right_one + 2]))


def _wrong_field(question: Question, rng: random.Random) -> str:
    return rng.choice([pair.split("=")[1] for pair in question.given.split("; ")])


def _wrong_order(question: Question, rng: random.Random) -> str:
    apart = " " if " " in question.given else ""
    items = question.answer.split() if apart else list(question.answer)
    if rng.random() < 0.25:
        return question.given if rng.random() < 0.5 else apart.join(reversed(items))
    at = rng.randrange(len(items) - 1)
    items[at], items[at + 1] = items[at + 1], items[at]
    return apart.join(items)


_MISTAKES: dict[str, Callable[[Question, random.Random], str]] = {
    "arithmetic": _wrong_sum,
    "count": _wrong_count,
    "extract": _wrong_field,
    "reverse": _wrong_order,
    "sort": _wrong_order,
}


def wordy(summary: str, less: bool, rng: random.Random) -> str:
    """A wordy way to say a summary; `less`: only its beginning, in fewer tokens than it has."""
    opening, ending = rng.choice(OPENINGS), rng.choice(ENDINGS)
    if less:
        opening, ending = rng.choice(SHORT), ""
    words = summary.split()
    if words[0][1:].islower() or len(words[0]) == 1:  # no name such as SocketIO
        words[0] = words[0].lower()
    if less:
        while len(words) > 2 and len(opening) + len(" ".join(words)) > LESS * len(summary):
            del words[-1]
        words[-1] = words[-1].rstrip(".,;:") + "."
    return opening + " ".join(words) + ending


def fixed_rows() -> tuple[list[str], list[str]]:
    """Train and held-out lines of the tasks with one right answer, task by task."""
    train: list[str] = []
    heldout: list[str] = []
    for task in FIXED:
        rng = random.Random(f"answers:{task}")
        of_training, of_test = fixed_questions(task)
        apart = {same for question in of_test for same in same_as(question)}
        known = {same for question in of_training for same in same_as(question)}
        rows: list[str] = []
        while len(rows) < NUM_HELDOUT + NUM_TRAIN:
            question = draw(task, rng)
            if not apart.isdisjoint(same_as(question)):
                continue
            if len(rows) < NUM_HELDOUT and not known.isdisjoint(same_as(question)):
                continue  # nor has training shown what is held out
            apart.update(same_as(question))
            rows.append(
                _row(task, question.prompt, question.answer, wrong_answer(question, rng), "exact")
            )
        heldout += rows[:NUM_HELDOUT]
        train += rows[NUM_HELDOUT:]
    return train, heldout


def concise_rows(split: str, folder: Path = FOLDER) -> list[str]:
    """Lines of the channel "concise", of the rows of real text in the same split."""
    rng = random.Random(f"preferences:concise:{split}")
    lines = (folder / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [row for row in map(json.loads, lines) if row["task_type"] in ("docstring", "describe")]
    rng.shuffle(rows)
    found: list[str] = []
    for row in rows[: NUM_CONCISE[split]]:
        prompt, summary = (message["content"] for message in row["messages"])
        # The longer half can be said in a wordy way and still be shorter.
        less = len(summary) >= 47
        found.append(_row("concise", prompt, summary, wordy(summary, less, rng)))
    return found


def _row(channel: str, prompt: str, chosen: str, rejected: str, check: str | None = None) -> str:
    row = {"prompt": prompt, "chosen": chosen, "rejected": rejected, "task_type": channel}
    return json.dumps(row | ({"check": check} if check else {}))


def write(folder: Path) -> dict[str, str]:
    """Write both files into `folder`; returns their SHA-256 by split."""
    folder.mkdir(parents=True, exist_ok=True)
    digests = {}
    for split, fixed in zip(("train", "heldout"), fixed_rows(), strict=True):
        data = "".join(line + "\n" for line in fixed + concise_rows(split)).encode()
        name = f"preferences_{split}"
        (folder / f"{name}.jsonl").write_bytes(data)
        digests[name] = hashlib.sha256(data).hexdigest()
    return digests


if __name__ == "__main__":
    print(write(Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER))
