"""Character weights -> token weights."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import numpy as np
import numpy.typing as npt

from posttrain_dist.data.chat.controls import Span
from posttrain_dist.data.chat.supervision import Weighted


def token_weights(
    offsets: Sequence[Span], spans: Sequence[Span | Weighted]
) -> npt.NDArray[np.float32]:
    """For every token that covers a character of a span the span's weight (1 if it has none).

    Spans are in order and do not overlap. Tokenizers that trim offsets give a token of spaces an
    empty range: such a token covers what lies between the token before and its own end.
    """
    weight_L = np.zeros(len(offsets), np.float32)
    if not spans or not len(offsets):
        return weight_L
    start_L, end_L = (
        np.fromiter(chain.from_iterable(offsets), np.int64, 2 * len(offsets)).reshape(-1, 2).T
    )
    if (start_L >= end_L).any():
        before_L = np.concatenate([[0], end_L[:-1]])
        start_L = np.where(start_L < end_L, start_L, before_L)
    for span in reversed(spans):  # a token of two spans has the weight of the first
        first, last = span[0], span[1]
        i, j = np.searchsorted(end_L, first, "right"), np.searchsorted(start_L, last, "left")
        weight_L[i:j][start_L[i:j] < end_L[i:j]] = span[2] if len(span) > 2 else 1.0
    return weight_L
