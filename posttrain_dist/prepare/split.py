"""Which rows are held out: a share of every channel, no content on both sides."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from posttrain_dist.errors import DataError
from posttrain_dist.flow import Record

_MASK = 2**64 - 1


def content_key(record: Record) -> int:
    """64 bits that are equal for rows with the same content, whatever their channel."""
    content: list[Any] = [
        record.messages,
        record.tools,
        record.text,
        record.input_ids,
        record.labels,
        [[answer.messages, answer.value, answer.margin] for answer in record.answers],
        [],  # keeps the keys of rows without answers as they were
    ]
    # Rows without variables keep the key that they had before there were any.
    content += [record.variables] if record.variables else []
    text = json.dumps(content, sort_keys=True)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def draw_one(key: int, seed: int) -> int:
    """A random number below 2**64, of a row's content and the seed alone (splitmix64)."""
    z = (key + (seed + 1) * 0x9E3779B97F4A7C15) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


def draw_many(key_R: npt.NDArray[np.uint64], seed: int) -> npt.NDArray[np.uint64]:
    """`draw_one` of each row; arrays of 64 bits count modulo 2**64 by themselves."""
    shift = [np.uint64(bits) for bits in (30, 27, 31)]
    z = key_R + np.uint64((seed + 1) * 0x9E3779B97F4A7C15 & _MASK)
    z = (z ^ (z >> shift[0])) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> shift[1])) * np.uint64(0x94D049BB133111EB)
    drawn: npt.NDArray[np.uint64] = z ^ (z >> shift[2])
    return drawn


@dataclass(slots=True)
class Split:
    """Rows of each side; rows of neither were held-out rows that also stand in train."""

    train_R: npt.NDArray[np.bool_]
    heldout_R: npt.NDArray[np.bool_]
    moved: int  # rows that would have been held out, but stand elsewhere too


def split_off(
    channel_R: npt.NDArray[np.integer], key_R: npt.NDArray[np.uint64], fraction: float, seed: int
) -> Split:
    """Hold out a share of every channel, by the rows' content and `seed`.

    A channel of more than one row gives at least one and keeps at least one. Content that stands
    in the data twice is never held out; a row drawn is replaced by the next. More rows or
    channels move no row that was drawn before, but for the change of the share itself.

    Args:
        channel_R: channel of each row.
        key_R: digest of each row's content.
        fraction: share to hold out, in [0, 1).
    """
    heldout_R = np.zeros(len(channel_R), np.bool_)
    moved = 0
    if fraction:
        _, inverse_R, times = np.unique(key_R, return_inverse=True, return_counts=True)
        alone_R = times[inverse_R] == 1
        draw_R = draw_many(key_R, seed)
        order_R = np.lexsort((np.arange(len(key_R)), draw_R, channel_R))
        starts = np.flatnonzero(np.diff(channel_R[order_R], prepend=-1))
        for rows in np.split(order_R, starts[1:]) if len(order_R) else ():
            wanted = min(max(1, round(fraction * len(rows))), len(rows) - 1)
            kept = rows[alone_R[rows]][:wanted]
            heldout_R[kept] = True
            moved += int(np.count_nonzero(~alone_R[rows[:wanted]]))
    return Split(train_R=~heldout_R, heldout_R=heldout_R, moved=moved)


def keep_apart(key_R: npt.NDArray[np.uint64], given_R: npt.NDArray[np.bool_]) -> Split:
    """Held-out rows from files of their own, without those that also stand in train.

    Raises:
        DataError: none is left.
    """
    train_R = ~given_R
    known_R = np.isin(key_R, key_R[train_R])
    heldout_R = given_R & ~known_R
    if given_R.any() and not heldout_R.any():
        raise DataError(
            "every held-out row also stands in the training data",
            where="data.eval",
            fix="give rows that are not trained on, or set data.eval=null to split some off",
        )
    return Split(train_R=train_R, heldout_R=heldout_R, moved=int((given_R & known_R).sum()))
