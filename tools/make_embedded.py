"""Make the embedded data set: `python tools/make_embedded.py [FOLDER]`.

The fixed-answer rows come out the same everywhere; the rows of real text depend on the Python
that runs this (the committed ones were made with CPython 3.11.7). Prints the digests that
`data/embedded.py` pins.
"""

from __future__ import annotations

import hashlib
import json
import random
import sys
from pathlib import Path

import stdlib_text
from skills import FIXED, Question, draw

FOLDER = Path(__file__).parents[1] / "posttrain_dist" / "assets" / "embedded"

NUM_HELDOUT = 48  # rows per channel
NUM_TRAIN = {"fixed": 450, "docstring": 900, "describe": 400}
ASK = {
    "docstring": "Write the docstring:\n{code}",
    "describe": "Describe the class:\n{code}",
}
CHANNEL_OF_KIND = {"function": "docstring", "class": "describe"}


def fixed_questions(task: str) -> tuple[list[Question], list[Question]]:
    """Train and held-out questions of one task; no two share what is given."""
    rng = random.Random(f"embedded:{task}")
    questions: list[Question] = []
    given: set[str] = set()
    while len(questions) < NUM_HELDOUT + NUM_TRAIN["fixed"]:
        question = draw(task, rng)
        if given.isdisjoint(same_as(question)):
            given.update(same_as(question))
            questions.append(question)
    return questions[NUM_HELDOUT:], questions[:NUM_HELDOUT]


def same_as(question: Question) -> set[str]:
    """`given` and what gives its answer away: the swapped sum, the reversed row."""
    same = {question.given}
    if question.task == "arithmetic" and "+" in question.given:
        same.add(" + ".join(reversed(question.given.split(" + "))))
    if question.task == "reverse":
        same.add(question.answer)
    return same


def fixed_rows(split: str) -> list[str]:
    """The lines of all fixed-answer channels for "train" or "heldout", channel by channel."""
    rows = []
    for task in FIXED:
        train, heldout = fixed_questions(task)
        for question in train if split == "train" else heldout:
            rows.append(_row(task, question.prompt, question.answer, check="exact"))
    return rows


def open_rows() -> tuple[list[str], list[str]]:
    """Train and held-out lines of the channels of real text, from this Python's library."""
    found: dict[str, dict[str, str]] = {channel: {} for channel in ASK}
    counts: dict[str, int] = {}
    for source, tree in stdlib_text.modules():
        for item in stdlib_text.documented(source, tree):
            counts[item.summary] = counts.get(item.summary, 0) + 1
            if _usable(item):
                found[CHANNEL_OF_KIND[item.kind]].setdefault(item.code, item.summary)
    train: list[str] = []
    heldout: list[str] = []
    for channel, pairs in found.items():
        rows = [
            _row(channel, ASK[channel].format(code=code), summary)
            for code, summary in sorted(pairs.items())
            if counts[summary] == 1  # so that leaving one function out leaves its text out
        ]
        random.Random(f"embedded:{channel}").shuffle(rows)
        heldout += rows[:NUM_HELDOUT]
        train += rows[NUM_HELDOUT:][: NUM_TRAIN[channel]]
    return train, heldout


def _usable(item: stdlib_text.Documented) -> bool:
    """Short, plain English, with enough code to go by."""
    longest = 160 if item.kind == "function" else 120
    text = item.summary
    return (
        30 <= len(item.code) <= longest
        and 20 <= len(text) <= 80
        and (item.code + text).isascii()
        and text[0].isupper()
        and text.endswith(".")
        and text.count(" ") >= 3
        and not set(text) & set("@<>{}|\\")
    )


def _row(channel: str, prompt: str, answer: str, check: str | None = None) -> str:
    messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    row: dict[str, object] = {"messages": messages, "task_type": channel}
    if check:
        row["check"] = check
    return json.dumps(row)


def write(folder: Path) -> dict[str, str]:
    """Write train.jsonl and heldout.jsonl into `folder`; returns their SHA-256 by split."""
    folder.mkdir(parents=True, exist_ok=True)
    open_train, open_heldout = open_rows()
    digests = {}
    for split, rows in (("train", open_train), ("heldout", open_heldout)):
        data = "".join(line + "\n" for line in fixed_rows(split) + rows).encode()
        (folder / f"{split}.jsonl").write_bytes(data)
        digests[split] = hashlib.sha256(data).hexdigest()
    return digests


if __name__ == "__main__":
    print(write(Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER))
