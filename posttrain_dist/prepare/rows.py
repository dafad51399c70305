"""Rows of a unit of a file -> their samples as flat arrays, and what is to be known of each."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt

from posttrain_dist.data import DataConfig, Template
from posttrain_dist.data.chat.encoder import Encoded, Encoder
from posttrain_dist.data.formats.records import Reader, Rejected, Unit
from posttrain_dist.errors import PosttrainError
from posttrain_dist.flow import Record
from posttrain_dist.models.folder import load_tokenizer
from posttrain_dist.prepare.similar import BANDS, signature
from posttrain_dist.prepare.split import content_key, draw_one

MAX_SHOWN = 100  # rejected rows that are kept in full; all are counted
MAX_TOLD = 20  # rows that are named for each failed check
PART_TOKENS = 1 << 20  # after which a part is handed over
PART_ROWS = 1 << 14
_BATCH_ROWS = 256  # that the tokenizer is given at once
_BATCH_CHARACTERS = 1 << 22  # ... of about so many characters
MAX_EXAMPLES = 5  # rows of each channel that the report shows

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Job:
    """What every process that tokenises needs to know."""

    model_folder: Path
    template: Template
    data: DataConfig
    seed: int
    text_rows: int  # rows of each channel that are kept as text


@dataclass(frozen=True, slots=True)
class Task:
    """One unit of one file set."""

    reader: Reader
    unit: Unit
    in_order: bool  # the rows kept as text are the first ones, not those that the seed draws
    keep_text: bool


class Lowest(Generic[T]):
    """The `limit` values of each channel with the lowest priorities; ties go to the first row."""

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

    def merge(self, other: Lowest[T], first_row: int) -> None:
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
class Part:
    """What came of some rows. Letters: L tokens, S samples, R rows that are not rejected."""

    file: str
    tokens_L: npt.NDArray[np.int32]
    weights_L: npt.NDArray[np.float32]
    near_RB: npt.NDArray[np.uint64]
    channels: list[str] = field(default_factory=list)  # names, in order of appearance
    lengths_S: list[int] = field(default_factory=list)
    row_S: list[int] = field(default_factory=list)  # position among the rows of this part
    truncated_S: list[bool] = field(default_factory=list)
    channel_R: list[int] = field(default_factory=list)  # index into `channels`
    key_R: list[int] = field(default_factory=list)  # 64 bits of the content's digest
    truncated_R: list[bool] = field(default_factory=list)
    dropped_R: list[bool] = field(default_factory=list)  # no target was left of the row
    dropped_places: dict[str, list[str]] = field(default_factory=dict)  # channel -> first ones
    rejected: list[Rejected] = field(default_factory=list)  # the first ones
    num_rejected: int = 0
    ends_file: bool = False  # a file could not be read on
    failed: Counter[str] = field(default_factory=Counter)  # check -> rows
    failed_places: dict[str, list[str]] = field(default_factory=dict)  # check -> first ones
    texts: Lowest[Record] = field(default_factory=lambda: Lowest(0))
    shown: Lowest[str] = field(default_factory=lambda: Lowest(MAX_EXAMPLES))  # their places


class RowEncoder:
    """Encodes units, in this process."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._encoder = Encoder(
            load_tokenizer(job.model_folder),
            job.template,
            max_length=job.data.max_length,
            long_rows=job.data.long_rows,
        )

    def parts(self, task: Task) -> Iterator[Part]:
        """Encode the rows of a unit, some at a time; what is wrong with a row is told in its part.

        At least one part, so that a file without rows is known too.
        """
        rows, more = task.reader.read(task.unit), True
        while more:
            building = _Building(self._new_part(task))
            part = building.part
            while more and building.num_tokens < PART_TOKENS and building.num_rows < PART_ROWS:
                batch, more = _take(rows)
                building.num_rows += len(batch)
                for record, samples in self._encoded(batch, part):
                    kept = [sample for sample in samples if sample.weight_L.any()]
                    self._add(building, record, samples, kept, task.in_order)
            yield building.finish()

    def _new_part(self, task: Task) -> Part:
        return Part(
            file=task.unit.file,
            tokens_L=np.empty(0, np.int32),
            weights_L=np.empty(0, np.float32),
            near_RB=np.empty((0, BANDS), np.uint64),
            texts=Lowest(self._job.text_rows if task.keep_text else 0),
        )

    def _encoded(
        self, batch: list[Record | Rejected], part: Part
    ) -> Iterator[tuple[Record, list[Encoded]]]:
        """The rows that can be used; the others are noted."""
        records = [row for row in batch if isinstance(row, Record)]
        results = iter(self._encoder.encode_many(records))
        for row in batch:
            result = row if isinstance(row, Rejected) else next(results)
            if isinstance(result, PosttrainError):
                result = _unusable(result, row)
            if isinstance(result, Rejected):
                part.num_rejected += 1
                part.ends_file = part.ends_file or result.ends_file
                part.rejected += [result] if len(part.rejected) < MAX_SHOWN else []
            elif isinstance(row, Record):
                yield row, result

    def _add(
        self,
        building: _Building,
        record: Record,
        samples: list[Encoded],
        kept: list[Encoded],
        in_order: bool,
    ) -> None:
        part = building.part
        row, key = len(part.channel_R), content_key(record)
        building.add(samples, kept)
        part.channel_R.append(building.channels.setdefault(record.channel, len(building.channels)))
        part.key_R.append(key)
        part.truncated_R.append(any(sample.truncated for sample in samples))
        part.dropped_R.append(not kept)
        if not kept:
            _tell(part.dropped_places, record.channel, record.where)
        part.lengths_S += [len(sample.input_ids_L) for sample in kept]
        part.truncated_S += [sample.truncated for sample in kept]
        part.row_S += [row] * len(kept)
        for fault in sorted({fault for sample in samples for fault in sample.faults}):
            part.failed[fault] += 1
            _tell(part.failed_places, fault, record.where)
        priority = draw_one(key, self._job.seed)
        part.shown.add(record.channel, priority, row, record.where)
        part.texts.add(record.channel, 0 if in_order else priority, row, record)


class _Building:
    """A part, and the arrays that it will hold."""

    def __init__(self, part: Part) -> None:
        self.part = part
        self.channels: dict[str, int] = {}
        self.num_tokens = self.num_rows = 0  # rows with those that were rejected
        self._tokens, self._weights = [part.tokens_L], [part.weights_L]
        self._near = [part.near_RB]

    def add(self, samples: list[Encoded], kept: list[Encoded]) -> None:
        """The samples of a row."""
        self._tokens += [sample.input_ids_L for sample in kept]
        self._weights += [sample.weight_L for sample in kept]
        nothing = np.empty(0, np.int32)
        self._near.append(signature(samples[0].input_ids_L if samples else nothing)[None])
        self.num_tokens += sum(len(sample.input_ids_L) for sample in kept)

    def finish(self) -> Part:
        """The part, whole."""
        part = self.part
        part.channels = list(self.channels)
        part.tokens_L, part.weights_L = np.concatenate(self._tokens), np.concatenate(self._weights)
        part.near_RB = np.concatenate(self._near)
        return part


def _take(rows: Iterator[Record | Rejected]) -> tuple[list[Record | Rejected], bool]:
    """The next rows, few where they are large; whether there may be more."""
    batch: list[Record | Rejected] = []
    num_characters = 0
    while len(batch) < _BATCH_ROWS and num_characters < _BATCH_CHARACTERS:
        row = next(rows, None)
        if row is None:
            return batch, False
        batch.append(row)
        if isinstance(row, Record):
            num_characters += len(row.text or "") + 8 * len(row.input_ids)
            num_characters += sum(len(str(turn.get("content"))) for turn in row.messages)
    return batch, True


def _unusable(error: PosttrainError, record: Any) -> Rejected:
    file, _, line = record.where.rpartition(":")
    return Rejected(file, int(line), None, "", error.what, error.fix)


def _tell(places: dict[str, list[str]], name: str, place: str) -> None:
    told = places.setdefault(name, [])
    if len(told) < MAX_TOLD:
        told.append(place)
