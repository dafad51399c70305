"""Prepared examples on disk: a split is a folder of flat arrays that every worker maps.

    tokens.npy       int32 [tokens]
    offsets.npy      int64 [samples + 1]   sample i is tokens[offsets[i] : offsets[i + 1]]
    run_lengths.npy  int32 [runs]          tokens that follow each other with one weight
    run_weights.npy  float32 [runs]
    run_offsets.npy  int64 [samples + 1]   its runs
    channels.npy     int16 [samples]       sources.npy    int16 [samples]
    ids.npy          int64 [samples]       truncated.npy  bool [samples]
    supervised.npy   int32 [samples]       targets, so that planning reads no token

Weights are kept as runs: a conversation has a few, where one float a token would double the size.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

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
}
_STARTS = {"offsets": "tokens", "run_offsets": "run_lengths"}  # array -> what it cuts
_HEADER_BYTES = 128
_FLUSH_TOKENS = 1 << 18  # about 2 MB in memory


# ------------------------------------------------------------------------------------- writing


class SplitWriter:
    """Writes one split, sample by sample, in bounded memory; `folder` is made.

        with SplitWriter(folder) as writer:
            writer.add(input_ids_L, weight_L, channel, source, sample_id, truncated)

    The arrays can be read after `close`; left by an exception, they stay unreadable.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        self._files = {name: _ArrayFile(folder / f"{name}.npy", d) for name, d in _DTYPES.items()}
        self._waiting: dict[str, list[Any]] = {name: [] for name in _DTYPES}
        self._waiting_tokens = 0
        self._starts = dict.fromkeys(_STARTS, 0)
        self._waiting["offsets"].append(0)
        self._waiting["run_offsets"].append(0)
        self.num_samples = 0

    def add(
        self,
        input_ids_L: npt.ArrayLike,
        weight_L: npt.ArrayLike,
        channel: int,
        source: int = 0,
        sample_id: int = 0,
        truncated: bool = False,
    ) -> None:
        """Append one sample; `weight_L` as in Example."""
        ids_L = np.array(input_ids_L, np.int32)  # a copy, for the caller may use its own again
        weights_L = np.asarray(weight_L, np.float32)
        length = len(ids_L)
        assert 0 < length == len(weights_L), f"{length} tokens, {len(weights_L)} weights"
        changes = np.flatnonzero(weights_L[1:] != weights_L[:-1]) + 1
        starts = np.concatenate([[0], changes])  # of its runs
        row = {
            "offsets": self._advance("offsets", length),
            "run_offsets": self._advance("run_offsets", len(starts)),
            "channels": channel,
            "sources": source,
            "ids": sample_id,
            "truncated": truncated,
            "supervised": int(np.count_nonzero(weights_L[1:])),
        }
        for name, value in row.items():
            self._waiting[name].append(value)
        self._waiting["tokens"].append(ids_L)
        self._waiting["run_lengths"].append(np.concatenate([changes, [length]]) - starts)
        self._waiting["run_weights"].append(weights_L[starts])
        self.num_samples += 1
        # A sample's other values weigh about as much as 64 tokens.
        self._waiting_tokens += length + 64
        if self._waiting_tokens >= _FLUSH_TOKENS:
            self._flush()

    def close(self) -> None:
        """Write what is left and make the arrays readable."""
        self._flush()
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

    def _advance(self, name: str, by: int) -> int:
        self._starts[name] += by
        return self._starts[name]

    def _flush(self) -> None:
        for name, values in self._waiting.items():
            whole = name in ("tokens", "run_lengths", "run_weights")
            if values:
                self._files[name].append(np.concatenate(values) if whole else values)
            values.clear()
        self._waiting_tokens = 0


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
        arrays: dict[str, npt.NDArray[Any]],
        index: npt.NDArray[np.int64],
        channels: list[str],
    ) -> None:
        # Of each sample, in the order of `index`:
        self.lengths: npt.NDArray[np.int32] = np.diff(arrays["offsets"]).astype(np.int32)[index]
        self.supervised: npt.NDArray[np.int32] = arrays["supervised"][index]  # its targets
        self.channel_ids: npt.NDArray[np.int16] = arrays["channels"][index]
        self.sources: npt.NDArray[np.int16] = arrays["sources"][index]
        self.sample_ids: npt.NDArray[np.int64] = arrays["ids"][index]
        self.channels = channels  # names; Example.channel is an index into them
        self._arrays, self._index = arrays, index

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
            _check_sizes(arrays)
            if split == "all":
                index = np.arange(len(arrays["ids"]))
            else:
                index = np.load(folder / f"{split}.npy", allow_pickle=False)
        except (OSError, ValueError, KeyError) as error:
            raise DataError(
                f"is no prepared data folder: {error}",
                where=str(folder),
                fix="delete it and start again: the data is then prepared anew",
            ) from error
        return cls(arrays, index, channels)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Example:
        arrays, index = self._arrays, int(self._index[index])
        start, end = arrays["offsets"][index : index + 2].tolist()
        runs = slice(*arrays["run_offsets"][index : index + 2].tolist())
        return Example(
            input_ids_L=arrays["tokens"][start:end],
            weight_L=np.repeat(arrays["run_weights"][runs], arrays["run_lengths"][runs]),
            channel=int(arrays["channels"][index]),
            sample_id=int(arrays["ids"][index]),
            truncated=bool(arrays["truncated"][index]),
        )


def _check_sizes(arrays: dict[str, npt.NDArray[Any]]) -> None:
    num_samples = len(arrays["offsets"]) - 1
    wanted = dict.fromkeys(arrays, num_samples)
    wanted |= dict.fromkeys(_STARTS, num_samples + 1)
    if num_samples >= 0 and len(arrays["run_offsets"]):
        wanted |= {cut: int(arrays[starts][-1]) for starts, cut in _STARTS.items()}
        wanted["run_weights"] = wanted["run_lengths"]
    for name, array in arrays.items():
        if len(array) != wanted[name]:
            raise ValueError(f"{name}.npy has {len(array)} entries, not {wanted[name]}")
