"""The tokens of one text as arrays. L is the number of tokens."""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tokenizers import Encoding

Ints = npt.NDArray[np.int32]


class TextTokens(NamedTuple):
    """Ids, and the characters [start, end) of each token."""

    ids_L: Ints
    start_L: Ints
    end_L: Ints

    @classmethod
    def of(cls, ids: Sequence[int], offsets: Sequence[tuple[int, int]]) -> TextTokens:
        """From lists, as `tokenizers` gives them."""
        pairs = np.fromiter(chain.from_iterable(offsets), np.int32, 2 * len(offsets))
        return cls(np.array(ids, np.int32), pairs[0::2], pairs[1::2])

    @classmethod
    def of_encoding(cls, encoding: Encoding) -> TextTokens:
        """From what `tokenizers` returns."""
        return cls.of(encoding.ids, encoding.offsets)

    def with_end(self, token: int, at: int) -> TextTokens:
        """These, and behind them a token without characters at place `at`."""
        ids_L, start_L, end_L = (
            np.append(array, np.int32(value))
            for array, value in zip(self, (token, at, at), strict=True)
        )
        return TextTokens(ids_L, start_L, end_L)
