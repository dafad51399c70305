"""The row of a unit whose data is not known: a prompt of half a pack, and answers behind it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

PROMPT_SHARE, NUM_ANSWERS = 0.5, 2  # of a pack's tokens; a pair


class AnswerRow(NamedTuple):
    """Samples of a row: tokens of each, the earlier sample that it follows (-1: none), targets."""

    lengths: tuple[int, ...]
    parents: tuple[int, ...]
    supervised: int


def answer_row(pack_lengths: Sequence[int], *, one_target: bool, shared: bool = True) -> AnswerRow:
    """One pair in each pack, whose prompt is half of it where both answers share it.

    Args:
        pack_lengths: tokens of each pack.
        one_target: only the last token of an answer is one (a reward model).
        shared: whether answers follow the prompt; else each is a sample with a prompt of its own.
    """
    lengths: list[int] = []
    parents: list[int] = []
    supervised = 0
    for tokens in pack_lengths:
        answer = max(1, round(tokens * (1 - PROMPT_SHARE)) // NUM_ANSWERS)
        if not shared:  # the same pair, as large as it may be
            answer = round(answer / (PROMPT_SHARE * (NUM_ANSWERS - 1) + 1)) or 1
            lengths += [max(1, tokens // NUM_ANSWERS)] * NUM_ANSWERS
            parents += [-1] * NUM_ANSWERS
        else:
            root = len(lengths)
            lengths += [max(1, tokens - NUM_ANSWERS * answer), *[answer] * NUM_ANSWERS]
            parents += [-1, *[root] * NUM_ANSWERS]
        supervised += NUM_ANSWERS * (1 if one_target else answer)
    return AnswerRow(tuple(lengths), tuple(parents), supervised)
