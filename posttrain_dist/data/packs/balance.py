"""Who runs which packs of a step: ranks get the same number of packs and about the same work."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from posttrain_dist.data.prepared.units import Units


@dataclass(frozen=True, slots=True)
class Cost:
    """Work of a sample of l tokens, s of them supervised: token·l + pair·l² + target·s.

    Behind b tokens of others, which are computed once, it is pair·l·(l + 2b).

    Only the ratios count. A layer of hidden size d spends 24d² operations a token on matrices and
    2d·l on causal attention, the head 2dV on a supervised token; so pair/token = 1 / (12d) and
    target/token = V / (12d · layers). The defaults are those of 32 layers with d = 4096 and
    V = 128k; they matter little below 8192 tokens.
    """

    token: float = 1.0
    pair: float = 2e-5
    target: float = 0.08

    @classmethod
    def of_model(cls, hidden_size: int, num_layers: int, vocab_size: int) -> Cost:
        """The ratios of one model."""
        width = 12.0 * hidden_size
        return cls(pair=1 / width, target=vocab_size / (width * num_layers))

    def of(
        self, lengths: npt.NDArray[np.integer], supervised: npt.NDArray[np.integer]
    ) -> npt.NDArray[np.float64]:
        """The work of each sample, alone."""
        length = np.asarray(lengths, np.float64)
        cost: npt.NDArray[np.float64] = length * (self.token + self.pair * length)
        return cost + self.target * supervised

    def of_units(self, units: Units) -> npt.NDArray[np.float64]:
        """The work of each unit."""
        cost = self.token * units.lengths + self.pair * units.causal_pairs()
        found: npt.NDArray[np.float64] = cost + self.target * units.supervised
        return found


_SWAPS = 100  # at most, after which ranks are as near as they come
_NEAR = 1e-3  # ranks this near to each other, in parts of their mean, are left alone


def assign_packs(costs: npt.NDArray[np.float64], world: int) -> list[list[int]]:
    """The packs of each rank, most expensive first; numbers of packs differ by one at most.

    Longest processing time first (Graham 1969) with equal counts: each next `world` packs are
    given out one per rank, the most expensive to the rank that has least so far. So the packs that
    ranks run at the same time, and wait for each other after, also cost about the same. Then, as
    long as it helps, the most expensive rank exchanges one pack with the cheapest.
    """
    order = np.argsort(-costs, kind="stable")
    packs: list[list[int]] = [[] for _ in range(world)]
    total = np.zeros(world)
    for start in range(0, len(order), world):
        group = order[start : start + world]
        ranks = np.argsort(total, kind="stable")[: len(group)]
        total[ranks] += costs[group]
        for rank, pack in zip(ranks.tolist(), group.tolist(), strict=True):
            packs[rank].append(pack)
    for _ in range(_SWAPS):
        if not _swap(packs, total, costs):
            break
    return [sorted(share, key=lambda pack: (-costs[pack], pack)) for share in packs]


def _swap(
    packs: list[list[int]], total: npt.NDArray[np.float64], costs: npt.NDArray[np.float64]
) -> bool:
    """Bring the most expensive and the cheapest rank together by one exchange, if there is one."""
    high, low = int(total.argmax()), int(total.argmin())
    gap = total[high] - total[low]
    if gap <= _NEAR * total.mean() or not packs[low]:
        return False
    saved = costs[packs[high]][:, None] - costs[packs[low]][None, :]
    off = np.abs(saved - gap / 2)  # half of the gap would close it
    give, take = np.unravel_index(int(off.argmin()), off.shape)
    # Not for a gain in the last digits, or two ranks could change for ever.
    if off[give, take] >= gap / 2 * (1 - 1e-6):
        return False
    packs[high][give], packs[low][take] = packs[low][take], packs[high][give]
    total[high] -= saved[give, take]
    total[low] += saved[give, take]
    return True
