"""One unit of a file -> its samples as flat arrays, and what is to be known of each row."""

from __future__ import annotations

import heapq
import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt

from posttrain_dist.data import DataConfig, Template
from posttrain_dist.data.masking import Encoded, Encoder
from posttrain_dist.data.records import Reader, Rejected, Unit
from posttrain_dist.data.similar import BANDS, signature
from posttrain_dist.errors import PosttrainError
from posttrain_dist.flow import Record
from posttrain_dist.models.folder import load_tokenizer
from posttrain_dist.prepare.split import content_key, draw_one

MAX_SHOWN = 100  # rejected rows that are kept in full; all are counted
MAX_TOLD = 20  # rows that are named for each failed check
_BATCH_ROWS = 256  # that the tokenizer is given at once
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
    """What came of one unit. Letters: L tokens, S samples, R rows that are not rejected."""

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

    def part(self, task: Task) -> Part:
        """Encode the rows of a unit; what is wrong with a row is told in the part."""
        part = Part(
            file=task.unit.file,
            tokens_L=np.empty(0, np.int32),
            weights_L=np.empty(0, np.float32),
            near_RB=np.empty((0, BANDS), np.uint64),
            texts=Lowest(self._job.text_rows if task.keep_text else 0),
        )
        channels: dict[str, int] = {}
        tokens, weights, near = [part.tokens_L], [part.weights_L], [part.near_RB]
        for record, samples in self._encoded(task, part):
            channel = channels.setdefault(record.channel, len(channels))
            kept = [sample for sample in samples if sample.weight_L.any()]
            self._add(part, record, channel, samples, kept, task.in_order)
            tokens += [sample.input_ids_L for sample in kept]
            weights += [sample.weight_L for sample in kept]
            near.append(signature(samples[0].input_ids_L if samples else part.tokens_L)[None])
        part.channels = list(channels)
        part.tokens_L, part.weights_L = np.concatenate(tokens), np.concatenate(weights)
        part.near_RB = np.concatenate(near)
        return part

    def _encoded(self, task: Task, part: Part) -> Iterator[tuple[Record, list[Encoded]]]:
        """The rows that can be used; the others are noted."""
        rows = task.reader.read(task.unit)
        while batch := list(itertools.islice(rows, _BATCH_ROWS)):
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
        part: Part,
        record: Record,
        channel: int,
        samples: list[Encoded],
        kept: list[Encoded],
        in_order: bool,
    ) -> None:
        row, key = len(part.channel_R), content_key(record)
        part.channel_R.append(channel)
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


def _unusable(error: PosttrainError, record: Any) -> Rejected:
    file, _, line = record.where.rpartition(":")
    return Rejected(file, int(line), None, "", error.what, error.fix)


def _tell(places: dict[str, list[str]], name: str, place: str) -> None:
    told = places.setdefault(name, [])
    if len(told) < MAX_TOLD:
        told.append(place)
