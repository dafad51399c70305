"""Which micro-batches of a run take the most memory, by the lengths of their samples alone.

    MicroBatches     the packs of a step, over ranks and micro-batches
    heaviest_rows    those whose row is the heaviest, in what a model keeps of a row

The rehearsal runs what is found here, and the planner counts it before anything starts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from posttrain_dist.data.packs.balance import assign_packs
from posttrain_dist.data.packs.order import Order
from posttrain_dist.data.packs.packing import Ints
from posttrain_dist.data.prepared.units import Units


@dataclass(frozen=True, slots=True, eq=False)
class MicroBatches:
    """How the packs of a step are split.

    Attributes:
        costs: work of each unit.
        batch_size: packs of a step, over all ranks.
        micro_batch_size: packs of one forward on one rank.
        world: number of ranks.
    """

    costs: npt.NDArray[np.float64]
    batch_size: int
    micro_batch_size: int
    world: int

    def shares(self, packs: Sequence[Ints]) -> list[list[int]]:
        """Numbers of the packs of each rank."""
        costs = np.array([self.costs[pack].sum() for pack in packs])
        return assign_packs(costs, self.world)

    def cut(self, share: list[int]) -> list[list[int]]:
        """The packs of a rank in micro-batches."""
        size = self.micro_batch_size
        return [share[start : start + size] for start in range(0, len(share), size)]


@dataclass(frozen=True, slots=True)
class RowMemory:
    """What a model keeps of a row beside something of each token, supervised or not.

    Attributes:
        pairs: attention keeps something of each pair of a token and one that it may attend to;
            where samples follow others it may anyway, in masks.
        inserted: virtual tokens that are put before each root (prompts).
        prefix: virtual tokens that stand before the keys of each root alone.
    """

    pairs: bool = False
    inserted: int = 0
    prefix: int = 0

    def keys(self, units: Units) -> list[Ints]:
        """Of each unit what adds up to the memory of a row, the tokens of the model first."""
        # Head and last MLP run on the targets alone.
        found: list[Ints] = [units.tokens(self.inserted), units.supervised]
        if self.pairs or units.before_S is not None:
            found.append(units.pairs(self.inserted, self.prefix))
        if self.prefix or units.before_S is not None:  # keys stand once more for each sample
            found.append(units.keys(self.inserted, self.prefix))
        return found


def heaviest_rows(order: Order, split: MicroBatches, keys: Ints, ties: Ints) -> list[list[int]]:
    """Samples of the micro-batch with the largest sum of each key, among the first packs of a run.

    Args:
        keys: [keys, packs], by `order.sums`.
        ties: [ties, packs]; of micro-batches that are equal in a key, that which is heavier in
            these is taken. Together they count for less than 1 of a key.
    """
    largest = np.maximum(keys.max(axis=1, keepdims=True), 1).astype(float)
    shares = ties / np.maximum(ties.max(axis=1, keepdims=True), 1)
    tie = shares.sum(axis=0) / (2 * len(ties) * split.micro_batch_size)
    return [_heaviest_of(order, split, key) for key in (keys + tie) / largest]


def _heaviest_of(order: Order, split: MicroBatches, key_P: npt.NDArray[np.float64]) -> list[int]:
    """Samples of the micro-batch with the largest sum of `key_P`, one number per pack.

    Looked for in the step whose largest packs weigh most: each `world` of them go to as many
    ranks, so that a micro-batch has one of each such group.
    """
    size, world = split.batch_size, split.world
    steps = -(-len(key_P) // size)
    by_step = np.zeros(steps * size)
    by_step[: len(key_P)] = key_P
    by_step = -np.sort(-by_step.reshape(steps, size), axis=1)
    bound = by_step[:, : split.micro_batch_size * world : world].sum(axis=1)
    step = int(bound.argmax())
    packs, key = order.packs(step + 1), key_P[step * size : (step + 1) * size]
    # Where the last pack that is looked at stands inside of a step, those after it weigh nothing.
    key = np.pad(key, (0, len(packs) - len(key)))
    micro_batches = [m for share in split.shares(packs) for m in split.cut(share)]
    heaviest = max(micro_batches, key=lambda numbers: key[numbers].sum())
    return [int(i) for pack in heaviest for i in packs[pack]]
