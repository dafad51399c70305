"""Prepared examples on disk: a split is a folder of flat arrays that every worker maps.

    tokens.npy       int32 [tokens]
    offsets.npy      int64 [samples + 1]   sample i is tokens[offsets[i] : offsets[i + 1]]
    run_lengths.npy  int32 [runs]          tokens that follow each other with one weight
    run_weights.npy  float32 [runs]
    run_offsets.npy  int64 [samples + 1]   its runs
    channels.npy     int16 [samples]       sources.npy    int16 [samples]
    ids.npy          int64 [samples]       truncated.npy  bool [samples]
    supervised.npy   int32 [samples]       targets, so that planning reads no token
    parents.npy      int32 [samples]       how many samples before it its parent stands; 0: none
    units.npy        int64 [samples]       samples of one unit follow each other, with one number
    extra_<name>_S.npy  float32 or int64 [samples]   of `Example.extra`; those that samples have

Weights are kept as runs: a conversation has a few, where one float per token would double the size.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from posttrain_dist.data.prepared.trees import joined
from posttrain_dist.data.prepared.units import Units
from posttrain_dist.errors import DataError
from posttrain_dist.flow import Example

_DTYPES = {
    "tokens": np.int32,
    "offsets": np.int64,
    "run_lengths": np.int32,
    "run_weights": np.float32,
    "run_offsets": np.int64,
    "channels": np.int16,
    "sources": np.int16,
    "ids": np.int64,
    "truncated": np.bool_,
    "supervised": np.int32,
    "parents": np.int32,
    "units": np.int64,
}
_EXTRA = "extra_"
_STARTS = {"offsets": "tokens", "run_offsets": "run_lengths"}  # array -> what it cuts
_HEADER_BYTES = 128
_NO_TOKEN, _NO_WEIGHT = np.empty(0, np.int32), np.empty(0, np.float32)

Arrays = dict[str, npt.NDArray[Any]]


# ------------------------------------------------------------------------------------- writing


def flatten(examples: Sequence[Example]) -> Arrays:
    """Examples laid end to end: the arrays of a split, without `sources`.

    Args:
        examples: each of one token at least; `parent` and `unit` count from the first of them.
    """
    lengths_S = np.array([len(each.input_ids_L) for each in examples], np.int64)
    weights = np.concatenate([_NO_WEIGHT, *(each.weight_L for each in examples)])
    offsets = np.concatenate([[0], np.cumsum(lengths_S)])
    first_S = offsets[:-1]
    assert lengths_S.all() and offsets[-1] == len(weights), "a weight for each token, and some"
    starts_run = np.zeros(len(weights), np.bool_)
    starts_run[1:] = weights[1:] != weights[:-1]
    starts_run[first_S] = True
    runs = np.flatnonzero(starts_run)
    is_target = weights != 0
    parent_S = [0 if each.parent is None else i - each.parent for i, each in enumerate(examples)]
    # The first token of a root is nobody's target.
    is_target[first_S[np.asarray(parent_S, np.int32) == 0]] = False
    num_targets = np.concatenate([[0], np.cumsum(is_target)])
    values = {
        "tokens": np.concatenate([_NO_TOKEN, *(each.input_ids_L for each in examples)]),
        "offsets": offsets,
        "run_lengths": np.diff(np.append(runs, len(weights))),
        "run_weights": weights[runs],
        "run_offsets": np.searchsorted(runs, offsets),
        "channels": [each.channel for each in examples],
        "ids": [each.sample_id for each in examples],
        "truncated": [each.truncated for each in examples],
        "supervised": np.diff(num_targets[offsets]),
        "parents": parent_S,
        "units": [i if each.unit is None else each.unit for i, each in enumerate(examples)],
    }
    arrays: Arrays = {name: np.asarray(value, _DTYPES[name]) for name, value in values.items()}
    for name in examples[0].extra if examples else ():
        column = np.array([each.extra[name] for each in examples])
        whole = np.issubdtype(column.dtype, np.integer)
        arrays[_EXTRA + name] = column.astype(np.int64 if whole else np.float32)
    return arrays


class SplitWriter:
    """Writes one split, some samples at a time, in bounded memory; `folder` is made.

        with SplitWriter(folder) as writer:
            writer.append(flatten(examples), source)

    The arrays can be read after `close`; left by an exception, they stay unreadable.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        self._folder = folder
        self._files = {name: _ArrayFile(folder / f"{name}.npy", d) for name, d in _DTYPES.items()}
        for name in _STARTS:
            self._files[name].append([0])
        self._ends = dict.fromkeys(_STARTS, 0)
        self.num_samples = 0

    def append(self, arrays: Arrays, source: int = 0) -> None:
        """Write samples behind the others.

        Args:
            arrays: of `flatten`.
            source: that all of them came from.
        """
        num_samples = len(arrays["ids"])
        if not num_samples:
            return
        for name in arrays.keys() - self._files.keys():  # of `extra`: of the first samples, then
            assert not self.num_samples, f"{name} is there of some samples only"
            self._files[name] = _ArrayFile(self._folder / f"{name}.npy", arrays[name].dtype)
        written = {**arrays, "sources": np.full(num_samples, source)}
        for name, end in self._ends.items():
            written[name] = arrays[name][1:] + end
            self._ends[name] = end + int(arrays[name][-1])
        written["units"] = arrays["units"] + self.num_samples
        for name, file in self._files.items():
            file.append(written[name])
        self.num_samples += num_samples

    def close(self) -> None:
        """Make the arrays readable."""
        for file in self._files.values():
            file.finish()

    def __enter__(self) -> SplitWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self.close()
        else:
            for file in self._files.values():
                file.stream.close()


class _ArrayFile:
    """A .npy file that grows; its header is written over in `finish`."""

    def __init__(self, path: Path, dtype: Any) -> None:
        self.dtype = np.dtype(dtype)
        self.stream = path.open("wb")
        self.stream.write(b"\0" * _HEADER_BYTES)  # unreadable until it is finished
        self._size = 0

    def append(self, values: npt.ArrayLike) -> None:
        array = np.ascontiguousarray(values, self.dtype)
        self._size += len(array)
        self.stream.write(array.data)

    def finish(self) -> None:
        self.stream.seek(0)
        header = {
            "shape": (self._size,),
            "fortran_order": False,
            "descr": np.lib.format.dtype_to_descr(self.dtype),
        }
        np.lib.format.write_array_header_1_0(self.stream, header)
        assert self.stream.tell() == _HEADER_BYTES, "numpy's header has another size"
        self.stream.close()


# ------------------------------------------------------------------------------------- reading


class Examples:
    """A prepared split, memory-mapped: `len(examples)`, `examples[i]`."""

    def __init__(
        self,
        arrays: Arrays,
        index: npt.NDArray[np.int64],
        channels: list[str],
    ) -> None:
        # Of each sample, in the order of `index`:
        ends = arrays["offsets"]
        sizes = np.subtract(ends[1:], ends[:-1], dtype=np.int32, casting="unsafe")
        self.lengths: npt.NDArray[np.int32] = sizes[index]
        self.supervised: npt.NDArray[np.int32] = arrays["supervised"][index]  # its targets
        self.channel_ids: npt.NDArray[np.int16] = arrays["channels"][index]
        self.sources: npt.NDArray[np.int16] = arrays["sources"][index]
        self.sample_ids: npt.NDArray[np.int64] = arrays["ids"][index]
        # How many samples before it its parent stands; 0: none.
        self.parents: npt.NDArray[np.int32] = arrays["parents"][index]
        self.channels = channels  # names; Example.channel is an index into them
        self._arrays, self._index = arrays, index
        self._extra = {
            name.removeprefix(_EXTRA): array
            for name, array in arrays.items()
            if name.startswith(_EXTRA)
        }
        self._token_extra: dict[str, npt.NDArray[Any]] = {}
        self.units = Units.of(
            arrays["units"][index],
            self.lengths,
            self.supervised,
            self.channel_ids,
            self.sources,
            self.parents,
        )

    @property
    def places(self) -> npt.NDArray[np.int64]:
        """Where the samples stand in the arrays."""
        return self._index

    @property
    def starts(self) -> npt.NDArray[np.int64]:
        """Of each sample, where its tokens begin in the array of all tokens."""
        starts: npt.NDArray[np.int64] = self._arrays["offsets"][self._index]
        return starts

    @property
    def num_stored_tokens(self) -> int:
        """Tokens of the arrays, of other splits too."""
        return len(self._arrays["tokens"])

    def subset(self, places: npt.NDArray[np.int64]) -> Examples:
        """Other samples of the same arrays: whole units, by their places there."""
        return Examples(self._arrays, places, self.channels)

    def add_token_field(self, name: str, values: npt.NDArray[Any]) -> None:
        """Give `Example.extra` of every sample the field `name_L`.

        Args:
            values: one number for each token of the arrays.
        """
        assert name.endswith("_L") and len(values) == self.num_stored_tokens, name
        self._token_extra[name] = values

    @classmethod
    def open(cls, folder: Path, split: str, channels: list[str] | None = None) -> Examples:
        """Open a split of a prepared folder.

        Args:
            split: "train", "eval", or "all" for what stands in neither too.
            channels: names; null: as summary.json has them.

        Raises:
            DataError: the folder was not prepared, or not to the end.
        """
        try:
            if channels is None:
                channels = json.loads((folder / "summary.json").read_bytes())["channels"]
            arrays = {
                name: np.load(folder / "samples" / f"{name}.npy", mmap_mode="r", allow_pickle=False)
                for name in _DTYPES
            }
            arrays |= {
                file.stem: np.load(file, mmap_mode="r", allow_pickle=False)
                for file in sorted((folder / "samples").glob(f"{_EXTRA}*.npy"))
            }
            _check_sizes(arrays)
            if split == "all":
                index = np.arange(len(arrays["ids"]))
            else:
                index = np.load(folder / f"{split}.npy", allow_pickle=False)
                _check_index(index, split, len(arrays["ids"]))
        except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"is no prepared data folder: {error}",
                where=str(folder),
                fix="delete it and start again: the data is then prepared again",
            ) from error
        return cls(arrays, index, channels)

    def __len__(self) -> int:
        return len(self.lengths)

    def extra(self, name: str) -> npt.NDArray[Any] | None:
        """A field of `Example.extra` of all samples, in their order; null: there is none."""
        return self._extra[name][self._index] if name in self._extra else None

    def __getitem__(self, index: int) -> Example:
        arrays, index = self._arrays, int(self._index[index])
        start, end = arrays["offsets"][index : index + 2].tolist()
        runs = slice(*arrays["run_offsets"][index : index + 2].tolist())
        before = int(arrays["parents"][index])
        return Example(
            input_ids_L=arrays["tokens"][start:end],
            weight_L=np.repeat(arrays["run_weights"][runs], arrays["run_lengths"][runs]),
            channel=int(arrays["channels"][index]),
            sample_id=int(arrays["ids"][index]),
            truncated=bool(arrays["truncated"][index]),
            extra={
                **{name: array[index] for name, array in self._extra.items()},
                **{name: array[start:end] for name, array in self._token_extra.items()},
            },
            parent=int(arrays["ids"][index - before]) if before else None,
            unit=int(arrays["units"][index]),
        )

    def path(self, index: int) -> Example:
        """A sample behind all that it follows, as one without a parent."""
        places = [index]
        while before := int(self._arrays["parents"][self._index[places[0]]]):
            places.insert(0, places[0] - before)
        return joined([self[place] for place in places])


def _check_index(index: npt.NDArray[Any], split: str, num_samples: int) -> None:
    if index.dtype.kind not in "iu" or index.ndim != 1:
        raise ValueError(f"{split}.npy holds no numbers of samples")
    if len(index) and not (index.min() >= 0 and index.max() < num_samples):
        raise ValueError(f"{split}.npy has samples beyond the {num_samples} that there are")


def _check_sizes(arrays: Arrays) -> None:
    num_samples = len(arrays["offsets"]) - 1
    wanted = dict.fromkeys(arrays, num_samples)
    wanted |= dict.fromkeys(_STARTS, num_samples + 1)
    if num_samples >= 0 and len(arrays["run_offsets"]):
        wanted |= {cut: int(arrays[starts][-1]) for starts, cut in _STARTS.items()}
        wanted["run_weights"] = wanted["run_lengths"]
    for name, array in arrays.items():
        if len(array) != wanted[name]:
            raise ValueError(f"{name}.npy has {len(array)} entries, not {wanted[name]}")
