"""Character weights -> token weights."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from posttrain_dist.data.chat.controls import Span
from posttrain_dist.data.chat.supervision import Weighted
from posttrain_dist.data.tokens.text_tokens import TextTokens


def token_weights(tokens: TextTokens, spans: Sequence[Span | Weighted]) -> npt.NDArray[np.float32]:
    """For every token that covers a character of a span the span's weight (1 if it has none).

    Spans are in order and do not overlap. Tokenizers that trim offsets give a token of spaces an
    empty range: such a token covers what lies between the token before and its own end.
    """
    start_L, end_L = tokens.start_L, tokens.end_L
    weight_L = np.zeros(len(end_L), np.float32)
    if not spans or not len(end_L):
        return weight_L
    is_empty_L = start_L >= end_L
    if is_empty_L.any():
        before_L = np.concatenate([[0], end_L[:-1]])
        start_L = np.where(is_empty_L, before_L, start_L)
    firsts, lasts = [span[0] for span in spans], [span[1] for span in spans]
    begin, behind = np.searchsorted(end_L, firsts, "right"), np.searchsorted(start_L, lasts, "left")
    # A token of two spans has the weight of the first.
    for span, i, j in zip(spans[::-1], begin.tolist()[::-1], behind.tolist()[::-1], strict=True):
        weight_L[i:j][start_L[i:j] < end_L[i:j]] = span[2] if len(span) > 2 else 1.0
    return weight_L
