"""What was found in all rows together.

Letters: R rows, S samples, B bands of a near-duplicate signature.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from posttrain_dist.data.formats.records import Rejected
from posttrain_dist.errors import DataError
from posttrain_dist.flow import Record
from posttrain_dist.prepare.rows import MAX_EXAMPLES, MAX_SHOWN, MAX_TOLD, Lowest, Part

MAX_CHANNELS = 256  # each is a row of every table and several metrics
_COLUMNS = {
    "channel": np.int64,
    "key": np.uint64,
    "set": np.int64,
    "truncated": np.bool_,
    "dropped": np.bool_,
}


@dataclass(slots=True)
class Tally:
    """Adds up parts, in the order of the files."""

    text_rows: int  # rows of each channel that are kept as text
    channels: list[str] = field(default_factory=list)  # by first appearance, then sorted
    num_rows: int = 0
    num_samples: int = 0
    longest: int = 0  # tokens
    largest_id: int = 0
    row_S: list[npt.NDArray[np.int64]] = field(default_factory=list)
    near_RB: list[npt.NDArray[np.uint64]] = field(default_factory=list)
    ends_file: bool = False  # a file could not be read on
    rejected: list[Rejected] = field(default_factory=list)  # the first ones
    failed: Counter[str] = field(default_factory=Counter)  # check -> rows
    failed_places: dict[str, list[str]] = field(default_factory=dict)  # check -> first ones
    dropped_places: dict[str, list[str]] = field(default_factory=dict)  # channel -> first ones
    rows_of_file: dict[str, list[int]] = field(default_factory=dict)  # [set, rows, rejected]
    texts: Lowest[Record] = field(init=False)
    shown: Lowest[str] = field(default_factory=lambda: Lowest(MAX_EXAMPLES))
    _columns: dict[str, list[npt.NDArray[Any]]] = field(default_factory=dict)
    _numbers: dict[str, int] = field(default_factory=dict)  # channel -> place in `channels`

    def __post_init__(self) -> None:
        self.texts = Lowest(self.text_rows)

    def add(self, part: Part, index: int) -> npt.NDArray[np.int64]:
        """Take in a part of file set `index`; the channel of each of its rows."""
        numbers = np.array([self._channel(name, part.file) for name in part.channels], np.int64)
        channel_R = numbers[np.array(part.channel_R, np.int64)]
        self._extend("channel", channel_R)
        self._extend("key", np.array(part.key_R, np.uint64))
        self._extend("set", np.full(len(channel_R), index, np.int64))
        self._extend("truncated", np.array(part.truncated_R, np.bool_))
        self._extend("dropped", np.array(part.dropped_R, np.bool_))
        self.row_S.append(np.array(part.row_S, np.int64) + self.num_rows)
        self.near_RB.append(part.near_RB)
        self.longest = max([self.longest, *part.lengths_S])
        self.largest_id = max(self.largest_id, int(part.tokens_L.max(initial=0)))
        self.ends_file = self.ends_file or part.ends_file
        self.rejected += part.rejected[: MAX_SHOWN - len(self.rejected)]
        self.failed += part.failed
        for ours, theirs in (
            (self.failed_places, part.failed_places),
            (self.dropped_places, part.dropped_places),
        ):
            for name, places in theirs.items():
                told = ours.setdefault(name, [])
                told += places[: MAX_TOLD - len(told)]
        self.texts.merge(part.texts, self.num_rows)
        self.shown.merge(part.shown, self.num_rows)
        counts = self.rows_of_file.setdefault(part.file, [index, 0, 0])
        counts[1] += len(channel_R)
        counts[2] += part.num_rejected
        self.num_rows += len(channel_R)
        self.num_samples += len(part.lengths_S)
        return channel_R

    def column(self, name: str) -> npt.NDArray[Any]:
        """One value a row: "channel", "key", "set", "truncated" or "dropped"."""
        return np.concatenate([np.empty(0, _COLUMNS[name]), *self._columns.get(name, [])])

    def rows_of_samples(self) -> npt.NDArray[np.int64]:
        """The row that each sample came from."""
        return np.concatenate([np.empty(0, np.int64), *self.row_S])

    def sort_channels(self, samples: Path) -> None:
        """Number the channels by name, here and in the file of the samples' channels."""
        names = sorted(self.channels)
        new = np.array([names.index(name) for name in self.channels], np.int16)
        self.channels = names
        self._columns["channel"] = [new[self.column("channel")].astype(np.int64)]
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
        self._columns.setdefault(name, []).append(values)
