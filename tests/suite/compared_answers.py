"""Prepared data with answers that are compared, written without a data file.

A prompt of words and two answers to it; which one is better follows from the answers alone.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from posttrain_dist.data.prepared.arrays import SplitWriter, flatten
from posttrain_dist.flow import Example

END = 0  # of a turn, in the tokenizer of the tests
GOOD, BAD = 20, 30  # a token that every better answer has, and every worse one


def sample(
    ids: Sequence[int],
    sample_id: int,
    parent: int | None = None,
    value: float = 0.0,
    *,
    unit: int = 0,
    margin: float = 0.0,
    channel: int = 0,
) -> Example:
    """A prompt (no parent), or an answer whose last token alone is a target."""
    is_answer = parent is not None
    weight_L = np.zeros(len(ids), np.float32)
    weight_L[-1] = is_answer
    extra = {"role_S": 0 if is_answer else -1, "value_S": value, "margin_S": margin}
    ids_L = np.array(ids, np.int32)
    return Example(ids_L, weight_L, channel, sample_id, extra=extra, parent=parent, unit=unit)


def unit(
    draw: np.random.Generator, first: int, values: Sequence[float], *, margin: float = 0.0
) -> list[Example]:
    """A prompt and an answer a value; those above 0 have GOOD in them, the others BAD."""
    words = draw.integers(40, 250, 6).tolist()
    found = [sample(words, first, unit=first, channel=first % 2)]
    for i, value in enumerate(values):
        mark = GOOD if value > 0 else BAD
        ids = [*draw.integers(40, 250, 2 + (first + i) % 3).tolist(), mark, END]
        wanted = margin if value == max(values) else 0.0
        found.append(
            sample(ids, first + 1 + i, first, value, unit=first, margin=wanted, channel=first % 2)
        )
    return found


def write(prepared: Path, pairs: int, heldout: int, seed: int = 0) -> None:
    """Put pairs in the place of the samples of a prepared folder with two channels or more."""
    draw = np.random.default_rng(seed)
    shutil.rmtree(prepared / "samples")
    with SplitWriter(prepared / "samples") as writer:
        examples: list[Example] = []
        for _ in range(pairs + heldout):
            examples += unit(draw, len(examples), (1.0, 0.0))
        writer.append(flatten(examples))
    np.save(prepared / "train.npy", np.arange(3 * pairs))
    np.save(prepared / "eval.npy", np.arange(3 * pairs, 3 * (pairs + heldout)))
