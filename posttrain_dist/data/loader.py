"""Prepared examples on disk, and the batches of each step: both the same on every rank.

A prepared split is a folder of flat arrays, memory-mapped by every worker:

    tokens.npy   int32 [tokens]       weights.npy    float32 [tokens]
    offsets.npy  int64 [samples + 1]  channels.npy   int16 [samples]
    ids.npy      int64 [samples]      truncated.npy  bool [samples]
"""

from __future__ import annotations

import json
import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from posttrain_dist.data.collate import collate, filler
from posttrain_dist.data.packing import best_fit, plan_epoch
from posttrain_dist.errors import DataError
from posttrain_dist.flow import Batch, Example

_ARRAYS = ("tokens", "weights", "offsets", "channels", "ids", "truncated")


def write_examples(folder: Path, examples: Sequence[Example]) -> None:
    """Write one split; `folder` is made."""
    folder.mkdir(parents=True)
    lengths = [len(example.input_ids_L) for example in examples]
    ids = [example.input_ids_L for example in examples]
    weights = [example.weight_L for example in examples]
    arrays = {
        "tokens": np.concatenate([np.empty(0, np.int32), *ids]),
        "weights": np.concatenate([np.empty(0, np.float32), *weights]),
        "offsets": np.array([0, *np.cumsum(lengths, dtype=np.int64)], np.int64),
        "channels": np.array([example.channel for example in examples], np.int16),
        "ids": np.array([example.sample_id for example in examples], np.int64),
        "truncated": np.array([example.truncated for example in examples], np.bool_),
    }
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array, allow_pickle=False)


class Examples:
    """A prepared split, memory-mapped: `len(examples)`, `examples[i]`."""

    def __init__(self, arrays: dict[str, npt.NDArray[Any]], channels: list[str]) -> None:
        self._arrays = arrays
        self.channels = channels  # names; Example.channel is an index into them
        self.lengths: npt.NDArray[np.int64] = np.diff(arrays["offsets"])  # tokens of each sample
        self.sample_ids: npt.NDArray[np.int64] = arrays["ids"]

    @classmethod
    def open(cls, folder: Path, split: str) -> Examples:
        """Open a split of a prepared folder: "train" or "eval".

        Raises:
            DataError: the folder was not prepared, or not to the end.
        """
        try:
            channels = json.loads((folder / "summary.json").read_bytes())["channels"]
            arrays = {name: _load(folder / split / f"{name}.npy") for name in _ARRAYS}
        except (OSError, ValueError, KeyError) as error:
            raise DataError(
                f"is no prepared data folder: {error}",
                where=str(folder),
                fix="delete it and start again: the data is then prepared anew",
            ) from error
        return cls(arrays, channels)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Example:
        arrays = self._arrays
        start, end = int(arrays["offsets"][index]), int(arrays["offsets"][index + 1])
        return Example(
            input_ids_L=arrays["tokens"][start:end],
            weight_L=arrays["weights"][start:end],
            channel=int(arrays["channels"][index]),
            sample_id=int(arrays["ids"][index]),
            truncated=bool(arrays["truncated"][index]),
        )


def _load(file: Path) -> npt.NDArray[Any]:
    array: npt.NDArray[Any] = np.load(file, mmap_mode="r", allow_pickle=False)
    return array


class PackedSource:
    """The batches of every step, for one rank.

    The packs of all epochs stand in one endless line; step k takes packs [(k - 1) * B, k * B) of
    it. Which samples are in a step depends on (seed, k) alone: `world`, `rank` and
    `micro_batch_size` only decide which rank runs them, and how many at once.

    Args:
        examples: a prepared split.
        max_length: tokens of a pack at most.
        window: samples that packing may reorder among themselves.
        seed: of the run.
        batch_size: packs of a step, over all ranks.
        micro_batch_size: packs of one forward on one rank.
        rank: this process.
        world: number of processes.
    """

    def __init__(
        self,
        examples: Examples,
        *,
        max_length: int,
        window: int,
        seed: int,
        batch_size: int,
        micro_batch_size: int,
        rank: int,
        world: int,
    ) -> None:
        self._examples = examples
        self._lengths: list[int] = examples.lengths.tolist()
        self._max_length, self._window, self._seed = max_length, window, seed
        self._batch_size, self._micro_batch_size = batch_size, micro_batch_size
        self._rank, self._world = rank, world
        self._starts = [0]  # first pack of each epoch planned so far, and of the next one
        self._plans: dict[int, list[list[int]]] = {}  # the two planned last
        self._end: int | None = None  # packs of the whole run; None: no end

    def total_steps(self, steps: int | None = None, epochs: float | None = None) -> int:
        """Steps of the run; `steps` as given, else enough for `epochs` (1 where that is null).

        Also settles where the run ends: with epochs the last step may hold fewer packs than the
        others, for no pack of the next epoch may fill it up.

        Raises:
            DataError: there is no sample.
        """
        if not len(self._examples):
            raise DataError("there is no sample to train on", fix="add rows to data.train")
        if steps is not None:
            self._end = None
            return steps
        whole, part = divmod(1.0 if epochs is None else epochs, 1)
        end = self._epoch_start(int(whole))
        if part:
            end += math.ceil(part * len(self._plan(int(whole))))
        self._end = end
        return math.ceil(end / self._batch_size)

    def step(self, k: int) -> list[Batch]:
        """This rank's micro-batches of step k, from 1; as many on every rank."""
        return list(self._deal(self._packs(k)))

    def sample_ids(self, k: int) -> list[int]:
        """Ids of the samples of step k over all ranks, in the order of its packs."""
        ids = self._examples.sample_ids
        return [int(ids[sample]) for pack in self._packs(k) for sample in pack]

    def _packs(self, k: int) -> list[list[int]]:
        start, end = (k - 1) * self._batch_size, k * self._batch_size
        if self._end is not None:
            end = min(end, self._end)
        return [self._pack(index) for index in range(start, end)]

    def eval_batches(self) -> Iterator[Batch]:
        """This rank's share of all examples, each exactly once over the ranks; fillers make up
        the same number of batches on every rank. One batch is made at a time.
        """
        packs: list[list[int]] = []
        for start in range(0, len(self._lengths), self._window):
            window = range(start, min(start + self._window, len(self._lengths)))
            packs += best_fit(window, self._lengths, self._max_length)
        return self._deal(packs)

    def _deal(self, packs: list[list[int]]) -> Iterator[Batch]:
        size = self._micro_batch_size
        micros = [packs[i : i + size] for i in range(0, len(packs), size)]
        mine = micros[self._rank :: self._world]
        for micro in mine:
            yield collate([self._examples[sample] for pack in micro for sample in pack])
        for _ in range(math.ceil(len(micros) / self._world) - len(mine)):
            yield filler()

    # ------------------------------------------------------------------- the line of packs

    def _pack(self, index: int) -> list[int]:
        while self._starts[-1] <= index:
            self._epoch_start(len(self._starts))
        epoch = bisect_right(self._starts, index) - 1
        return self._plan(epoch)[index - self._epoch_start(epoch)]

    def _epoch_start(self, epoch: int) -> int:
        while len(self._starts) <= epoch:
            packs = self._plan(len(self._starts) - 1)
            self._starts.append(self._starts[-1] + len(packs))
        return self._starts[epoch]

    def _plan(self, epoch: int) -> list[list[int]]:
        if epoch not in self._plans:
            while len(self._plans) > 1:
                del self._plans[next(iter(self._plans))]
            self._plans[epoch] = plan_epoch(
                self._lengths, self._max_length, self._window, self._seed, epoch
            )
        return self._plans[epoch]
