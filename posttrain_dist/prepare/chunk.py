"""What goes from a process that tokenises to the one that writes: Examples, and facts of rows."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import numpy as np
import numpy.typing as npt

from posttrain_dist.data.chat.encoder import RowExamples
from posttrain_dist.data.formats.records import Rejected
from posttrain_dist.data.prepared.arrays import Arrays, flatten
from posttrain_dist.data.prepared.trees import numbered, share_beginnings
from posttrain_dist.flow import Example, Record
from posttrain_dist.prepare.similar import signatures

MAX_REJECTED = 100  # rejected rows that are kept in full; all are counted
MAX_PLACES = 20  # rows that are named for each failed check
MAX_EXAMPLES = 5  # rows of each channel that the report shows

T = TypeVar("T")


class BottomK(Generic[T]):
    """The `limit` values of each channel with the lowest priorities; ties go to the first row.

    With priorities that are hashes, a sample of the rows that no order of reading changes.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._heaps: dict[str, list[tuple[int, int, T]]] = {}  # the highest on top

    def add(self, channel: str, priority: int, row: int, value: T) -> None:
        """Offer a value; `row` is unique."""
        heap = self._heaps.setdefault(channel, [])
        entry = (-priority, -row, value)
        if len(heap) < self._limit:
            heapq.heappush(heap, entry)
        elif heap and entry[:2] > heap[0][:2]:
            heapq.heapreplace(heap, entry)

    def merge(self, other: BottomK[T], first_row: int) -> None:
        """Offer all values of `other`, whose rows are counted from `first_row`."""
        for channel, heap in other._heaps.items():
            for priority, row, value in heap:
                self.add(channel, -priority, first_row - row, value)

    def values(self) -> Iterator[tuple[str, int, T]]:
        """(channel, row, value), the lowest first."""
        for channel, heap in self._heaps.items():
            for _, row, value in sorted(heap, key=lambda entry: (-entry[0], -entry[1])):
                yield channel, -row, value


@dataclass(slots=True)
class TurnCost:
    """Rows that are trained turn by turn, and what that costs."""

    rows: int = 0
    samples: int = 0
    tokens: int = 0  # of these samples; what they share is counted once
    whole: int = 0  # tokens of the longest sample of each row: about those of the conversation

    def add(self, other: TurnCost) -> None:
        """Count what another one has."""
        self.rows += other.rows
        self.samples += other.samples
        self.tokens += other.tokens
        self.whole += other.whole


@dataclass(slots=True)
class RowFacts:
    """What is counted while rows are encoded; rows are numbered from 0, without rejected ones."""

    file: str
    texts: BottomK[Record]
    shown: BottomK[str] = field(default_factory=lambda: BottomK(MAX_EXAMPLES))  # their places
    dropped_places: dict[str, list[str]] = field(default_factory=dict)  # channel -> first ones
    rejected: list[Rejected] = field(default_factory=list)  # the first ones
    num_rejected: int = 0
    num_left_out: int = 0  # rows of weight 0
    ends_file: bool = False  # a file could not be read on
    turns: TurnCost = field(default_factory=TurnCost)
    failed: Counter[str] = field(default_factory=Counter)  # check -> rows
    failed_places: dict[str, list[str]] = field(default_factory=dict)  # check -> first ones

    def reject(self, row: Rejected) -> None:
        """Count a row that cannot be used."""
        self.num_rejected += 1
        self.ends_file = self.ends_file or row.ends_file
        if len(self.rejected) < MAX_REJECTED:
            self.rejected.append(row)

    def fail(self, check: str, place: str) -> None:
        """Count a row that fails a check."""
        self.failed[check] += 1
        add_place(self.failed_places, check, [place])


@dataclass(frozen=True, slots=True)
class Chunk:
    """The Examples of some rows as flat arrays, and beside them what is known of each row.

    Letters: S samples, R rows that are not rejected, B bands of a signature.
    """

    facts: RowFacts
    examples: Arrays  # of `flatten`
    row_S: npt.NDArray[np.int64]  # the row of each sample
    channels: list[str]  # names, in order of appearance
    channel_R: npt.NDArray[np.int64]  # index into `channels`
    key_R: npt.NDArray[np.uint64]  # 64 bits of the content's digest
    truncated_R: npt.NDArray[np.bool_]
    dropped_R: npt.NDArray[np.bool_]  # no target was left of the row
    near_RB: npt.NDArray[np.uint64]  # signatures for near duplicates


class ChunkBuilder:
    """Collects rows until there are enough for a Chunk.

    Args:
        capacity: tokens of a unit in which turns of a row share what they begin with; null: they
            share nothing.
    """

    def __init__(self, facts: RowFacts, capacity: int | None = None) -> None:
        self.facts, self._capacity = facts, capacity
        self.num_tokens = 0
        self._examples: list[Example] = []
        self._row_S: list[int] = []
        self._channels: dict[str, int] = {}
        self._channel_R: list[int] = []
        self._key_R: list[int] = []
        self._truncated_R: list[bool] = []
        self._dropped_R: list[bool] = []
        self._ids_R: list[npt.NDArray[np.int32]] = []  # of the first sample, or of all units

    def add(self, record: Record, key: int, result: RowExamples) -> int:
        """Take in a row that can be used; its number.

        Args:
            key: of its content.
            result: that the encoder made of it; what has no target is left out, but for prompts.
        """
        row, examples = len(self._key_R), result.examples
        kept = [each for each in examples if result.is_units or each.weight_L.any()]
        near_L = examples[0].input_ids_L if examples else np.empty(0, np.int32)
        if result.is_units and kept:
            near_L = np.concatenate([each.input_ids_L for each in kept])
        if result.by_turns and kept:
            cost = TurnCost(1, len(kept), whole=max(len(each.input_ids_L) for each in kept))
            kept = share_beginnings(kept, self._capacity) if self._capacity else kept
            cost.tokens = sum(len(each.input_ids_L) for each in kept)
            self.facts.turns.add(cost)
        if any(each.unit is not None for each in kept[:1]):
            kept = numbered(kept, len(self._examples))
        self._examples += kept
        self._row_S += [row] * len(kept)
        self._channel_R.append(self._channels.setdefault(record.channel, len(self._channels)))
        self._key_R.append(key)
        self._truncated_R.append(any(each.truncated for each in examples))
        self._dropped_R.append(not kept)
        self._ids_R.append(near_L)
        self.num_tokens += sum(len(each.input_ids_L) for each in kept)
        if not kept:
            add_place(self.facts.dropped_places, record.channel, [record.where])
        for check in sorted(result.faults):
            self.facts.fail(check, record.where)
        return row

    def finish(self) -> Chunk:
        """All that was taken in."""
        return Chunk(
            facts=self.facts,
            examples=flatten(self._examples),
            row_S=np.array(self._row_S, np.int64),
            channels=list(self._channels),
            channel_R=np.array(self._channel_R, np.int64),
            key_R=np.array(self._key_R, np.uint64),
            truncated_R=np.array(self._truncated_R, np.bool_),
            dropped_R=np.array(self._dropped_R, np.bool_),
            near_RB=signatures(self._ids_R),
        )


def add_place(places: dict[str, list[str]], name: str, more: Sequence[str]) -> None:
    """Keep the first places of a name."""
    kept = places.setdefault(name, [])
    kept += more[: MAX_PLACES - len(kept)]
