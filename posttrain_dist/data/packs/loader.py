"""The batches of each step, for one rank: every rank runs the same number of micro-steps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from posttrain_dist.data.packs.balance import Cost
from posttrain_dist.data.packs.collate import Declares, collate, filler
from posttrain_dist.data.packs.heaviest import MicroBatches, RowMemory, heaviest_rows
from posttrain_dist.data.packs.mixing import Mixture
from posttrain_dist.data.packs.order import Order
from posttrain_dist.data.packs.packing import Ints, plan_in_order
from posttrain_dist.data.prepared.arrays import Examples
from posttrain_dist.errors import DataError
from posttrain_dist.flow import Batch

# In which the heaviest micro-batch is looked for: later ones hold the same samples once more.
SCANNED_PACKS = 1 << 20


class PackedSource:
    """The batches of every step, for one rank.

    Which samples are in a step depends on (seed, step) alone: `world`, `rank` and
    `micro_batch_size` only decide which rank runs them, and how many at once.

    Args:
        examples: a prepared split.
        objective: what a filler needs in `Batch.extra`.
        max_length: tokens of a pack at most.
        window: samples that packing may reorder among themselves.
        seed: of the run.
        batch_size: packs of a step, over all ranks.
        micro_batch_size: packs of one forward on one rank.
        rank: this process.
        world: number of processes.
        mixture: what an epoch draws; None: every sample once.
        cost: what ranks are balanced by.
        vocab_size: where given, tokens are checked against it.
    """

    prefetchable = True  # its batches are a function of the step alone

    def __init__(
        self,
        examples: Examples,
        objective: Declares,
        *,
        max_length: int,
        window: int,
        seed: int,
        batch_size: int,
        micro_batch_size: int,
        rank: int,
        world: int,
        mixture: Mixture | None = None,
        cost: Cost | None = None,
        vocab_size: int | None = None,
    ) -> None:
        self._examples, self._objective, self._mixture = examples, objective, mixture
        self._max_length, self._window, self._rank = max_length, window, rank
        self._vocab_size = vocab_size
        self._units = units = examples.units
        costs = (cost or Cost()).of_units(units)
        self._split = MicroBatches(costs, batch_size, micro_batch_size, world)
        self._order = Order(
            units.lengths,
            max_length=max_length,
            window=window,
            seed=seed,
            batch_size=batch_size,
            mixture=mixture,
        )

    def total_steps(
        self, steps: int | None = None, epochs: float | None = None, tokens: int | None = None
    ) -> int:
        """Steps of the run; `steps` as given, else enough for `tokens` or `epochs` (default 1).

        Also settles where the run ends: with epochs or tokens the last step may hold fewer packs
        than the others, for no pack beyond the end may fill it up.

        Args:
            tokens: real tokens, supervised or not, that the model reads in the run.

        Raises:
            DataError: there is no sample.
            ConfigError: several ends are given, or none is above 0.
        """
        if not len(self._examples):
            raise DataError("there is no sample to train on", fix="add rows to data.train")
        return self._order.settle(steps, epochs, tokens)

    def step(self, k: int) -> list[Batch]:
        """This rank's micro-batches of step k, from 1; as many on every rank."""
        return list(self._assigned(self._order.packs(k)))

    def sample_ids(self, k: int) -> list[int]:
        """Ids of the samples of step k over all ranks, in the order of its packs."""
        drawn = self._samples(np.concatenate(self._order.packs(k)))
        ids: list[int] = self._examples.sample_ids[drawn].tolist()
        return ids

    def drawn_units(self, steps: int) -> npt.NDArray[np.bool_]:
        """Which units of the examples are in a run of `steps` at all."""
        drawn = np.zeros(len(self._units), np.bool_)
        for k in range(1, steps + 1):
            drawn[np.concatenate(self._order.packs(k))] = True
            if k % 64 == 0 and drawn.all():
                break
        return drawn

    def source_amounts(self, k: int) -> dict[str, float]:
        """Rows, or supervised tokens, that step k takes from each source of a mixture."""
        if self._mixture is None:
            return {}
        amounts = self._mixture.amounts(np.concatenate(self._order.packs(k)))
        return dict(zip(self._mixture.names(), amounts.tolist(), strict=True))

    def target_shares(self) -> dict[int, dict[str, float]]:
        """From a step on: channel -> the share of supervised tokens that the mixture asks for."""
        if self._mixture is None:
            return {}
        units = self._units
        return {
            step: dict(
                zip(
                    self._examples.channels,
                    self._mixture.group_shares(phase, units.channel_ids, units.supervised),
                    strict=False,
                )
            )
            for phase, step in enumerate(self._mixture.phase_starts)
        }

    def eval_batches(self) -> Iterator[Batch]:
        """This rank's share of all examples, each exactly once over the ranks; fillers make up
        the same number of batches on every rank. One batch is made at a time.
        """
        plan = plan_in_order(self._units.lengths, self._max_length, self._window)
        return self._assigned([plan[pack] for pack in range(len(plan))])

    def heaviest(self, steps: int, memory: RowMemory | None = None) -> list[list[Batch]]:
        """An update for each way in which a micro-batch may take the most memory of a run of
        `steps`: that with most tokens first, that with most targets, then what `memory` adds; the
        same on all ranks, whichever of them has it in the run.

        A micro-batch comes twice where the run adds up several, so that gradients are there when
        the second one begins.
        """
        units, split = self._units, self._split
        packs = min(steps * split.batch_size, SCANNED_PACKS)
        keys = (memory or RowMemory()).keys(units)
        sums = self._order.sums((*keys, units.causal_pairs(), units.supervised), packs)
        found = heaviest_rows(self._order, split, sums[: len(keys)], sums[len(keys) :])
        adds_up = -(-split.batch_size // split.world) > split.micro_batch_size
        once = dict.fromkeys(map(tuple, found))
        return [[self._collate(units)] * (2 if adds_up else 1) for units in once]

    def _assigned(self, packs: Sequence[Ints]) -> Iterator[Batch]:
        shares = self._split.shares(packs)
        mine = self._split.cut(shares[self._rank])
        most = len(self._split.cut(max(shares, key=len)))
        for numbers in mine:
            yield self._collate([int(i) for pack in numbers for i in packs[pack]])
        for _ in range(most - len(mine)):
            yield filler(self._objective)

    def _samples(self, units: Sequence[int] | Ints) -> list[int]:
        """The samples of some units, in order."""
        return [sample for unit in units for sample in self._units.samples(int(unit))]

    def _collate(self, units: Sequence[int]) -> Batch:
        return collate(
            [self._examples[i] for i in self._samples(units)],
            self._vocab_size,
            own_rows=self._objective.own_rows,
        )
