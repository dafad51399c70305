"""Rows that are nearly the same: signatures of tokens, and who shares one.

tokens -> set of runs of 5 -> 54 smallest hashes -> 6 band hashes; equal band, similar rows

MinHash (Broder 1997): the smallest hash of a set equals that of another with probability J, their
Jaccard similarity |A and B| / |A or B|. A band joins 9 of them, so that two rows share at least
one of the 6 bands with probability 1 - (1 - J^9)^6:

    J       0.30     0.50    0.70    0.80    0.90    0.95
    found   0.01 %   1.2 %   22 %    58 %    95 %    99.7 %

18 hashes in 3 bands of 6 would be cheaper, but find 4.6 % of pairs at 0.50 and miss 10 % at 0.90:
rows of one task share their wording, and each is compared with all others.

Shape legend: L tokens of a row, R rows, B bands, H hashes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryFile

import numpy as np
import numpy.typing as npt

Bools = npt.NDArray[np.bool_]
Words = npt.NDArray[np.uint64]
Numbers = npt.NDArray[np.uint32]

RUN_TOKENS = 5
BANDS = 6
_BAND_HASHES = 9
_NUM_HASHES = BANDS * _BAND_HASHES
_CHUNK = 4096  # runs at a time: 54 hashes of them are 0.9 MB, which stays in the cache


def _odd(num_rows: int, num_columns: int, seed: int) -> Words:
    # A fixed stream of a fixed generator: signatures are the same in every process and machine.
    random = np.random.Generator(np.random.PCG64(seed))
    return random.integers(0, 1 << 64, (num_rows, num_columns), np.uint64) | np.uint64(1)


_PLACES = _odd(1, RUN_TOKENS, 1)[0]  # one factor a place of the run
_MIX = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio
_HALF = np.uint64(32)
_FACTORS = _odd(_NUM_HASHES, 1, 2).astype(np.uint32)
_JOIN = _odd(BANDS, _BAND_HASHES, 3)


def signature(input_ids_L: npt.NDArray[np.integer]) -> Words:
    """The band hashes of a row, uint64 [BANDS]; a row of fewer than 5 tokens is hashed whole.

    What all rows of a set begin with, such as one long system prompt, makes them all similar:
    leave it out of `input_ids_L`.
    """
    found: Words = signatures([input_ids_L])[0]
    return found


def signatures(rows: Sequence[npt.NDArray[np.integer]]) -> Words:
    """The signature of each row, uint64 [R, BANDS]; of many rows at once it costs half."""
    least_RH = np.full((len(rows), _NUM_HASHES), np.iinfo(np.uint32).max, np.uint32)
    runs = [max(len(ids), RUN_TOKENS) - RUN_TOKENS + 1 for ids in rows]
    first, num_runs = 0, 0
    for row, num in enumerate(runs):
        num_runs += num
        if num_runs >= _CHUNK or row == len(rows) - 1:
            _add_least(rows[first : row + 1], runs[first : row + 1], least_RH[first : row + 1])
            first, num_runs = row + 1, 0
    joined = least_RH.reshape(len(rows), BANDS, _BAND_HASHES) * _JOIN
    bands_RB: Words = joined.sum(axis=2, dtype=np.uint64)
    bands_RB ^= bands_RB >> _HALF
    bands_RB *= _MIX
    return bands_RB


def _add_least(
    rows: Sequence[npt.NDArray[np.integer]], num_runs: Sequence[int], least_RH: Numbers
) -> None:
    """Put the smallest hashes of some rows into `least_RH`."""
    filled = [_filled(ids) for ids in rows]
    runs = np.correlate(np.concatenate(filled), _PLACES, "valid")  # modulo 2^64
    # A run that begins in one row and ends in the next is of neither.
    lengths, starts = np.array([len(ids) for ids in filled]), np.cumsum([0, *map(len, filled)])
    ends = np.arange(len(runs)) - np.repeat(starts[:-1], lengths)[: len(runs)] + RUN_TOKENS
    runs = runs[ends <= np.repeat(lengths, lengths)[: len(runs)]]
    runs ^= runs >> _HALF
    runs *= _MIX
    hashes = (runs >> _HALF).astype(np.uint32)
    begin = np.cumsum([0, *num_runs[:-1]])
    for start in range(0, len(hashes), _CHUNK):
        # An odd factor permutes the 32-bit hashes, each another way. Adding a constant too, as is
        # common, costs time and brings nothing: what comes in is mixed already.
        part = hashes[start : start + _CHUNK] * _FACTORS
        here = np.flatnonzero((begin < start + _CHUNK) & (begin + num_runs > start))
        places = np.maximum(begin[here] - start, 0)
        least = np.minimum.reduceat(part, places, axis=1).T
        least_RH[here] = np.minimum(least_RH[here], least)


def _filled(input_ids_L: npt.NDArray[np.integer]) -> Words:
    """Ids, and where there are fewer than 5 behind them what is no token."""
    ids = np.asarray(input_ids_L).astype(np.uint64)
    if len(ids) >= RUN_TOKENS:
        return ids
    missing = RUN_TOKENS - len(ids)
    return np.concatenate([ids, np.full(missing, np.iinfo(np.uint64).max, np.uint64)])


class Bands:
    """The signatures of many rows, in a file for each band: they are the most of what is known of
    a row, and are looked at one band at a time. Iterated over, it gives each band, uint64 [R].

    Args:
        folder: where the files are; they have no name, and are gone with this object.
    """

    def __init__(self, folder: Path) -> None:
        with contextlib.ExitStack() as opened:
            self._files = [opened.enter_context(TemporaryFile(dir=folder)) for _ in range(BANDS)]
            self._opened = opened.pop_all()

    def append(self, signatures_RB: Words) -> None:
        """Add the next rows."""
        for file, band in zip(self._files, signatures_RB.T, strict=True):
            file.write(np.ascontiguousarray(band).data)

    def __iter__(self) -> Iterator[Words]:
        for file in self._files:
            file.seek(0)
            yield np.fromfile(file, np.uint64)

    def close(self) -> None:
        """Remove the files."""
        self._opened.close()


def near_duplicates(bands_BR: Iterable[Words], exact_keys_R: npt.ArrayLike) -> Bools:
    """Rows that share a band with an earlier row of other content, bool [R].

    The first row of a cluster is not among them. A row that is an exact copy of one row and
    nearly that of another is: leave out exact copies first to count each row once.

    Args:
        bands_BR: of all rows, one band after the other.
        exact_keys_R: equal for rows of the same content: integers, or bytes of one length.
    """
    keys = np.asarray(exact_keys_R)
    found = np.zeros(len(keys), bool)
    if len(keys) < 2:
        return found
    for band in bands_BR:
        order = np.argsort(band, kind="stable")  # within a band value, rows stay in their order
        values = band[order]
        first = np.concatenate([[True], values[1:] != values[:-1]])
        del values  # of many rows each of these is large
        start = np.where(first, np.arange(len(keys), dtype=np.int32), np.int32(0))
        np.maximum.accumulate(start, out=start)
        contents = keys[order]
        # From the first row on that differs from its group's first, every row of the group has
        # an earlier one of other content.
        other = np.cumsum(contents != contents[start], dtype=np.int32)
        del contents
        found[order] |= other > other[start]
    return found


def near_leaks(bands_BR: Iterable[Words], train_R: Bools, heldout_R: Bools) -> Bools:
    """Held-out rows that share a band with a training row, bool [held-out rows]."""
    found = np.zeros(int(np.count_nonzero(heldout_R)), bool)
    if not train_R.any() or not len(found):
        return found
    for band in bands_BR:
        known, heldout = np.sort(band[train_R]), band[heldout_R]
        at = np.searchsorted(known, heldout).clip(max=len(known) - 1)
        found |= known[at] == heldout
    return found
