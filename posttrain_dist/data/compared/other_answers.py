"""For each row an answer to another prompt: what KTO estimates its KL divergence by.

Ethayarajh et al. (2024), section 4.1: z0 is the KL divergence over answers that do not belong to
their prompts. Such an answer is that of the next row of the channel that has another prompt, in
the order of the file; the last rows take that of the first ones. A channel with one prompt alone
takes that of another channel.

It depends on the rows of one unit of a file (`build_dataset.UNIT_BYTES` of JSON lines, else the
whole file) and on nothing else: not on the processes, nor on how many rows are encoded at a time.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from posttrain_dist.data.compared.answer_encoder import AnsweredRow, AnswerTokens
from posttrain_dist.flow import Record

Waiting = tuple[Record, AnsweredRow]
Ready = tuple[Record, AnsweredRow, list[AnswerTokens]]


class OtherAnswers:
    """Holds a row back until the row is known whose answers it takes."""

    def __init__(self) -> None:
        self._waiting: dict[str, list[Waiting]] = {}  # channel -> rows of one prompt
        # Channel -> its first row, and the first one of another prompt.
        self._firsts: dict[str, list[AnsweredRow]] = {}

    def add(self, record: Record, row: AnsweredRow) -> Iterator[Ready]:
        """The rows that take the answers of this one."""
        waiting = self._waiting.setdefault(record.channel, [])
        firsts = self._firsts.setdefault(record.channel, [])
        if len(firsts) < 2 and not any(_same(row, first) for first in firsts):
            firsts.append(row)
        if waiting and not _same(waiting[0][1], row):
            for ready, answered in waiting:
                yield ready, answered, row.answers
            waiting.clear()
        waiting.append((record, row))

    def finish(self) -> Iterator[Ready]:
        """The last rows; without any answer where all rows have one prompt."""
        for channel, waiting in self._waiting.items():
            elsewhere = [
                first for name, rows in self._firsts.items() if name != channel for first in rows
            ]
            for record, row in waiting:
                known = [*self._firsts[channel], *elsewhere]
                other = next((first for first in known if not _same(row, first)), None)
                yield record, row, other.answers if other is not None else []
        self._waiting.clear()


def _same(row: AnsweredRow, other: AnsweredRow) -> bool:
    return np.array_equal(row.prompt_L, other.prompt_L)
