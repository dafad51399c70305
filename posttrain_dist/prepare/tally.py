"""What was found in all rows together.

Of a row 12 bytes stay in memory, of a sample 4; its signature is on the disk, see similar.py.

Letters: R rows, S samples.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from posttrain_dist.data.formats.records import Rejected
from posttrain_dist.data.prepared.units import tokens_before
from posttrain_dist.errors import DataError
from posttrain_dist.flow import Record
from posttrain_dist.prepare.chunk import (
    MAX_EXAMPLES,
    MAX_REJECTED,
    BottomK,
    Chunk,
    TurnCost,
    add_place,
)
from posttrain_dist.prepare.similar import Bands

MAX_CHANNELS = 256  # each is a row of every table and several metrics
_COLUMNS = {
    "channel": np.int16,
    "key": np.uint64,
    "truncated": np.bool_,
    "dropped": np.bool_,
}


@dataclass(slots=True)
class Tally:
    """Adds up chunks, in the order of the files."""

    text_rows: int  # rows of each channel that are kept as text
    bands: Bands  # signatures of the rows
    channels: list[str] = field(default_factory=list)  # by first appearance, then sorted
    num_rows: int = 0
    num_samples: int = 0
    longest: int = 0  # tokens
    largest_id: int = 0
    row_S: list[npt.NDArray[np.int32]] = field(default_factory=list)
    rows_of_set: list[tuple[int, int]] = field(default_factory=list)  # (set, rows), in order
    ends_file: bool = False  # a file could not be read on
    rejected: list[Rejected] = field(default_factory=list)  # the first ones
    turns: TurnCost = field(default_factory=TurnCost)
    failed: Counter[str] = field(default_factory=Counter)  # check -> rows
    failed_places: dict[str, list[str]] = field(default_factory=dict)  # check -> first ones
    dropped_places: dict[str, list[str]] = field(default_factory=dict)  # channel -> first ones
    # file -> [set, rows, rejected, left out]
    rows_of_file: dict[str, list[int]] = field(default_factory=dict)
    texts: BottomK[Record] = field(init=False)
    shown: BottomK[str] = field(default_factory=lambda: BottomK(MAX_EXAMPLES))
    _columns: dict[str, list[npt.NDArray[Any]]] = field(default_factory=dict)
    _numbers: dict[str, int] = field(default_factory=dict)  # channel -> place in `channels`

    def __post_init__(self) -> None:
        self.texts = BottomK(self.text_rows)

    def add(self, chunk: Chunk, index: int) -> npt.NDArray[np.int64]:
        """Take in a chunk of file set `index`; the channel of each of its rows."""
        facts, num_rows = chunk.facts, len(chunk.channel_R)
        numbers = [self._channel(name, facts.file) for name in chunk.channels]
        channel_R = np.array(numbers, np.int64)[chunk.channel_R]
        self._extend("channel", channel_R)
        self._extend("key", chunk.key_R)
        self.rows_of_set.append((index, num_rows))
        self._extend("truncated", chunk.truncated_R)
        self._extend("dropped", chunk.dropped_R)
        self.row_S.append((chunk.row_S + self.num_rows).astype(np.int32))
        self.bands.append(chunk.near_RB)
        lengths_S = np.diff(chunk.examples["offsets"])
        paths_S = lengths_S + tokens_before(lengths_S, chunk.examples["parents"])
        self.longest = max(self.longest, int(paths_S.max(initial=0)))
        self.largest_id = max(self.largest_id, int(chunk.examples["tokens"].max(initial=0)))
        self.ends_file = self.ends_file or facts.ends_file
        self.rejected += facts.rejected[: MAX_REJECTED - len(self.rejected)]
        self.turns.add(facts.turns)
        self.failed += facts.failed
        for ours, theirs in (
            (self.failed_places, facts.failed_places),
            (self.dropped_places, facts.dropped_places),
        ):
            for name, places in theirs.items():
                add_place(ours, name, places)
        self.texts.merge(facts.texts, self.num_rows)
        self.shown.merge(facts.shown, self.num_rows)
        counts = self.rows_of_file.setdefault(facts.file, [index, 0, 0, 0])
        counts[1] += num_rows
        counts[2] += facts.num_rejected
        counts[3] += facts.num_left_out
        self.num_rows += num_rows
        self.num_samples += len(lengths_S)
        return channel_R

    def column(self, name: str) -> npt.NDArray[Any]:
        """One value per row: "channel", "key", "truncated" or "dropped"."""
        return np.concatenate([np.empty(0, _COLUMNS[name]), *self._columns.get(name, [])])

    @property
    def num_rejected(self) -> int:
        """Rows of all files that cannot be used; `rejected` has the first ones."""
        return sum(counts[2] for counts in self.rows_of_file.values())

    @property
    def num_left_out(self) -> int:
        """Rows of all files that have the weight 0."""
        return sum(counts[3] for counts in self.rows_of_file.values())

    def of_sets(self, chosen: Collection[int]) -> npt.NDArray[np.bool_]:
        """Whether each row is of one of the file sets."""
        sets, sizes = np.array([[-1, 0], *self.rows_of_set], np.int64).T
        return np.repeat(np.isin(sets, list(chosen)), sizes)

    def rows_of_samples(self) -> npt.NDArray[np.int32]:
        """The row that each sample came from."""
        return np.concatenate([np.empty(0, np.int32), *self.row_S])

    def sort_channels(self, samples: Path) -> None:
        """Number the channels by name, here and in the file of the samples' channels."""
        names = sorted(self.channels)
        new = np.array([names.index(name) for name in self.channels], np.int16)
        self.channels = names
        self._columns["channel"] = [new[self.column("channel")]]
        stored = samples / "channels.npy"
        np.save(stored, new[np.load(stored)], allow_pickle=False)

    def _channel(self, name: str, file: str) -> int:
        if name not in self._numbers:
            if len(self._numbers) == MAX_CHANNELS:
                some = ", ".join(repr(known) for known in self.channels[-3:])
                raise DataError(
                    f"the rows name more than {MAX_CHANNELS} channels, such as {some}",
                    where=file,
                    fix="a channel is a kind of task: its key is task_type, else channel, "
                    "data_source, dataset or source; name the right one by "
                    "'data.columns={task_type: <key>}'",
                )
            self._numbers[name] = len(self.channels)
            self.channels.append(name)
        return self._numbers[name]

    def _extend(self, name: str, values: npt.NDArray[Any]) -> None:
        self._columns.setdefault(name, []).append(values.astype(_COLUMNS[name], copy=False))
