"""Units of samples that stay together, as planning needs them: sizes, without a token.

A sample that follows others (`Example.parent`) is attended behind all of their tokens: its path is
these and its own. Letters: S samples of a split, U units.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.signedinteger]


@dataclass(frozen=True, slots=True, eq=False)
class Units:
    """What is planned: samples that stay together, in the order that a split has them.

    Most are of one sample; where all are, nothing is kept of samples.
    """

    first: npt.NDArray[np.int64]  # [U + 1] unit u is the samples first[u] to first[u + 1]
    lengths: npt.NDArray[np.int32]  # [U] tokens
    supervised: npt.NDArray[np.int32]  # [U] targets
    channel_ids: npt.NDArray[np.int16]  # [U]
    sources: npt.NDArray[np.int16]  # [U]
    # [S] tokens of each sample, and tokens that it follows; None: each unit is one sample.
    own_S: npt.NDArray[np.int32] | None = None
    before_S: npt.NDArray[np.int32] | None = None

    @classmethod
    def of(
        cls,
        number_S: npt.NDArray[np.int64],
        lengths: npt.NDArray[np.int32],
        supervised: npt.NDArray[np.int32],
        channel_ids: npt.NDArray[np.int16],
        sources: npt.NDArray[np.int16],
        parents: npt.NDArray[np.int32],
    ) -> Units:
        """Of the samples of a split.

        Args:
            number_S: the unit of each.
            lengths: tokens of each, as what follows is of each.
            parents: how many samples before it its parent stands; 0: it has none.
        """
        starts = np.flatnonzero(np.diff(number_S, prepend=-1))
        first = np.append(starts, len(number_S))
        channels, origins = channel_ids[starts], sources[starts]
        if len(starts) == len(number_S):
            return cls(first, lengths, supervised, channels, origins)
        return cls(
            first,
            np.add.reduceat(lengths, starts, dtype=np.int32),
            np.add.reduceat(supervised, starts, dtype=np.int32),
            channels,
            origins,
            own_S=lengths,
            before_S=tokens_before(lengths, parents),
        )

    def __len__(self) -> int:
        return len(self.lengths)

    def samples(self, unit: int) -> range:
        """The places of the samples of a unit in the split."""
        return range(int(self.first[unit]), int(self.first[unit + 1]))

    def tokens(self, inserted: int = 0) -> npt.NDArray[np.int64]:
        """[U] tokens of the model's row, with so many virtual ones before each root."""
        return self.lengths.astype(np.int64) + inserted * self._roots()

    def keys(self, inserted: int = 0, prefix: int = 0) -> npt.NDArray[np.int64]:
        """[U] tokens of all paths together: the keys that samples attend to, each by itself.

        Args:
            inserted: virtual tokens before each root.
            prefix: keys that stand before those of each root.
        """
        if self.own_S is None or self.before_S is None:
            return self.lengths.astype(np.int64) + inserted + prefix
        return self._sum(self.own_S.astype(np.int64) + self.before_S + inserted + prefix)

    def pairs(self, inserted: int = 0, prefix: int = 0) -> npt.NDArray[np.int64]:
        """[U] tokens of each sample times those of its path, added up: attention's full matrices.

        Args:
            inserted, prefix: as those of `keys`.
        """
        if self.own_S is None or self.before_S is None:
            own_U = self.tokens(inserted)
            return own_U * (own_U + prefix)
        path_S = self.own_S.astype(np.int64) + self.before_S + inserted + prefix
        return self._sum((self.own_S + inserted * (self.before_S == 0)) * path_S)

    def causal_pairs(self) -> npt.NDArray[np.int64]:
        """[U] twice the pairs of tokens that causal attention computes; l² of one sample of l."""
        if self.own_S is None or self.before_S is None:
            return self.lengths.astype(np.int64) ** 2
        return self._sum(self.own_S * (self.own_S + 2 * self.before_S.astype(np.int64)))

    def _roots(self) -> npt.NDArray[np.int64] | int:
        """[U] samples that follow no other."""
        return 1 if self.before_S is None else self._sum((self.before_S == 0).astype(np.int64))

    def _sum(self, values_S: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        return np.add.reduceat(values_S, self.first[:-1]) if len(self) else values_S


def tokens_before(lengths: npt.NDArray[Any], parents: npt.NDArray[np.int32]) -> npt.NDArray[Any]:
    """[S] tokens that each sample follows: those of its parent, and of the parent's parents.

    Args:
        lengths: tokens of each sample.
        parents: how many samples before it its parent stands; 0: it has none.
    """
    before = np.zeros_like(lengths)
    child = np.flatnonzero(parents)
    while len(child):  # once for each generation
        parent = child - parents[child]
        found = before[parent] + lengths[parent]
        changed = found != before[child]
        before[child] = found
        # Those whose own parents have just got more.
        child = child[np.isin(parent, child[changed])]
    return before
