"""Log-probabilities of prepared samples as a folder, beside the prepared data and in the cache.

    logprob.npy   float32 [tokens]   one for each token of the prepared arrays; NaN: not a target,
                                     or not computed
    done.npy      bool [samples]     whose targets are all there
    about.json    key                what they depend on
                  digests            of both files once the pass is over; null until then

A pass fills it part by part, values first: after a kill it goes on behind the last whole part.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from posttrain_dist.errors import DataError, reason
from posttrain_dist.files import commit_folder, digest_of, partial_of, read_object, write_atomic

LOGPROB, DONE, ABOUT = "logprob.npy", "done.npy", "about.json"
_CHUNK = 1 << 20  # values that are written at once
_KEPT_DAYS = 30  # that an entry of the cache stays after its last use


class StoredLogProbs:
    """The folder of one run; on rank 0 alone but for `values`.

    Args:
        key: what the values depend on: others that are there are removed.
        num_tokens: of the prepared arrays.
        num_samples: of the prepared arrays.
    """

    def __init__(self, folder: Path, key: str, num_tokens: int, num_samples: int) -> None:
        self.folder, self._key = folder, key
        self._shapes = {LOGPROB: (num_tokens,), DONE: (num_samples,)}

    def restore(self, cached: Path) -> bool:
        """Have the folder there: as it is, from the cache, or empty.

        Args:
            cached: the entry of the cache that belongs to the key.

        Returns:
            Whether values came from the cache.

        Raises:
            DataError: it cannot be written.
        """
        if self._fits(self.folder):
            return False
        try:
            shutil.rmtree(self.folder, ignore_errors=True)
            if self._fits(cached) and _digests(cached) is not None:
                with contextlib.suppress(OSError):
                    _copy(cached, self.folder)
                    os.utime(cached)  # used now
                if self._fits(self.folder):  # else another run replaced it meanwhile
                    return True
                shutil.rmtree(self.folder, ignore_errors=True)
            self._create()
        except OSError as error:
            raise _unwritable(self.folder, error) from error
        return False

    def done(self) -> npt.NDArray[np.bool_]:
        """Of each sample whether its values are there."""
        found: npt.NDArray[np.bool_] = np.load(self.folder / DONE, allow_pickle=False)
        return found

    def write(
        self,
        tokens: npt.NDArray[np.int64],
        values: npt.NDArray[np.float32],
        samples: npt.NDArray[np.int64],
    ) -> None:
        """Take in a part: the values of some tokens, which are all that these samples have.

        Raises:
            DataError: the disk refuses it.
        """
        try:
            self._write_about(None)
            array = np.load(self.folder / LOGPROB, mmap_mode="r+", allow_pickle=False)
            array[tokens] = values
            array.flush()  # before it is said that they are there
            done = np.load(self.folder / DONE, mmap_mode="r+", allow_pickle=False)
            done[samples] = True
            done.flush()
        except OSError as error:
            raise _unwritable(self.folder, error) from error

    def finish(self, cached: Path) -> None:
        """The pass is over: keep digests, and a copy in the cache where that can be done."""
        if _digests(self.folder) is not None:
            return
        try:
            files = {name: asdict(digest_of(self.folder / name)) for name in self._shapes}
            self._write_about(files)
        except OSError as error:
            raise _unwritable(self.folder, error) from error
        with contextlib.suppress(OSError):
            cached.parent.mkdir(parents=True, exist_ok=True)
            _sweep(cached.parent)
            _copy(self.folder, cached)

    def values(self) -> npt.NDArray[np.float32]:
        """What `Examples.add_token_field` takes, mapped from the disk; on every rank.

        Raises:
            DataError: it cannot be read.
        """
        try:
            array: npt.NDArray[np.float32] = np.load(
                self.folder / LOGPROB, mmap_mode="r", allow_pickle=False
            )
        except (OSError, ValueError) as error:
            raise DataError(
                f"the log-probabilities of the reference cannot be read: {error}",
                where=str(self.folder / LOGPROB),
                fix="every worker must see the run folder; delete this one to compute them again",
            ) from error
        return array

    def _fits(self, folder: Path) -> bool:
        """Whether a folder holds values of this key, undamaged as far as it is known."""
        try:
            if read_object(folder / ABOUT).get("key") != self._key:
                return False
            for name, shape in self._shapes.items():
                if np.load(folder / name, mmap_mode="r", allow_pickle=False).shape != shape:
                    return False
            known = _digests(folder) or {}
            return all(asdict(digest_of(folder / name)) == each for name, each in known.items())
        except (OSError, ValueError, EOFError, AttributeError):
            return False

    def _create(self) -> None:
        partial = partial_of(self.folder)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for name, value in ((LOGPROB, np.float32(np.nan)), (DONE, np.bool_(False))):
            _write_constant(partial / name, value, self._shapes[name][0])
        self._write_about(None, partial)
        commit_folder(partial, self.folder)

    def _write_about(self, digests: dict[str, Any] | None, folder: Path | None = None) -> None:
        about = {"key": self._key, "digests": digests}
        path = (folder or self.folder) / ABOUT
        if read_object(path) != about:
            write_atomic(path, json.dumps(about), to_disk=True)


def _digests(folder: Path) -> dict[str, Any] | None:
    found: dict[str, Any] | None = read_object(folder / ABOUT).get("digests")
    return found


def _write_constant(path: Path, value: np.generic, size: int) -> None:
    """An array of one value, written and not mapped: a full disk is then an error, not a signal."""
    with path.open("wb") as file:
        header = {
            "shape": (size,),
            "fortran_order": False,
            "descr": np.lib.format.dtype_to_descr(value.dtype),
        }
        np.lib.format.write_array_header_1_0(file, header)
        for start in range(0, size, _CHUNK):
            file.write(np.full(min(_CHUNK, size - start), value).data)


def _copy(source: Path, target: Path) -> None:
    partial = target.with_name(f"{target.name}.{os.getpid()}.partial")
    try:
        partial.mkdir(parents=True)
        for name in (LOGPROB, DONE, ABOUT):
            shutil.copyfile(source / name, partial / name)
        commit_folder(partial, target, replace=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _sweep(cache: Path) -> None:
    """Remove what has not been used for long."""
    for entry in cache.iterdir():
        if time.time() - entry.stat().st_mtime > _KEPT_DAYS * 86400:
            shutil.rmtree(entry, ignore_errors=True)


def _unwritable(folder: Path, error: OSError) -> DataError:
    return DataError(
        f"the log-probabilities of the reference cannot be written: {reason(error)}",
        where=str(folder),
        fix="make room on the disk of the run folder; the pass goes on where it was",
    )
