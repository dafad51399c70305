"""The batches of each step, for one rank: every rank runs the same number of micro-steps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from posttrain_dist.data.packs.balance import Cost, assign_packs
from posttrain_dist.data.packs.collate import Declares, collate, filler
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
        self._max_length, self._window, self._batch_size = max_length, window, batch_size
        self._micro_batch_size, self._rank, self._world = micro_batch_size, rank, world
        self._vocab_size = vocab_size
        self._costs = (cost or Cost()).of(examples.lengths, examples.supervised)
        self._order = Order(
            examples.lengths,
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
        ids: list[int] = self._examples.sample_ids[np.concatenate(self._order.packs(k))].tolist()
        return ids

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
        examples = self._examples
        return {
            step: dict(
                zip(
                    examples.channels,
                    self._mixture.group_shares(phase, examples.channel_ids, examples.supervised),
                    strict=False,
                )
            )
            for phase, step in enumerate(self._mixture.phase_starts)
        }

    def eval_batches(self) -> Iterator[Batch]:
        """This rank's share of all examples, each exactly once over the ranks; fillers make up
        the same number of batches on every rank. One batch is made at a time.
        """
        plan = plan_in_order(self._examples.lengths, self._max_length, self._window)
        return self._assigned([plan[pack] for pack in range(len(plan))])

    def heaviest(self, steps: int, *, pairs: bool = False) -> list[list[Batch]]:
        """An update whose micro-batch takes the most memory of a run of `steps`; the same on all
        ranks, whichever of them has it in the run.

        That is the one with most tokens. It comes twice where the run adds up micro-batches, so
        that gradients are there when the second one begins.

        Args:
            pairs: attention keeps something of each pair of tokens of a sample: an update with the
                largest sum of squared lengths comes too.
        """
        lengths = self._examples.lengths.astype(np.int64)
        planned = min(steps * self._batch_size, SCANNED_PACKS)
        sums = self._order.sums((lengths, lengths**2, self._examples.supervised), planned)
        largest = np.maximum(sums.max(axis=1, keepdims=True), 1).astype(float)
        tokens, squares, supervised = sums / largest
        # Of equal ones the heavier in what counts next: below the difference of one token.
        tie = (squares + supervised) / (4 * self._micro_batch_size * largest[0])
        keys = [tokens + tie, *([squares] if pairs else [])]
        found = {tuple(self._heaviest_of(key)) for key in keys}
        adds_up = -(-self._batch_size // self._world) > self._micro_batch_size
        return [[self._collate(samples)] * (2 if adds_up else 1) for samples in sorted(found)]

    def _heaviest_of(self, key_P: npt.NDArray[np.float64]) -> list[int]:
        """Samples of the micro-batch with the largest sum of `key_P`, one number per pack.

        Looked for in the step whose largest packs weigh most: each `world` of them go to as many
        ranks, so that a micro-batch has one of each such group.
        """
        size, world = self._batch_size, self._world
        steps = -(-len(key_P) // size)
        by_step = np.zeros(steps * size)
        by_step[: len(key_P)] = key_P
        by_step = -np.sort(-by_step.reshape(steps, size), axis=1)
        bound = by_step[:, : self._micro_batch_size * world : world].sum(axis=1)
        step = int(bound.argmax())
        packs, key = self._order.packs(step + 1), key_P[step * size : (step + 1) * size]
        micro_batches = [m for share in self._shares(packs) for m in self._cut(share)]
        heaviest = max(micro_batches, key=lambda numbers: key[numbers].sum())
        return [int(i) for pack in heaviest for i in packs[pack]]

    def _assigned(self, packs: Sequence[Ints]) -> Iterator[Batch]:
        shares = self._shares(packs)
        mine = self._cut(shares[self._rank])
        most = len(self._cut(max(shares, key=len)))
        for numbers in mine:
            yield self._collate([int(i) for pack in numbers for i in packs[pack]])
        for _ in range(most - len(mine)):
            yield filler(self._objective)

    def _shares(self, packs: Sequence[Ints]) -> list[list[int]]:
        """Numbers of the packs of each rank."""
        costs = np.array([self._costs[pack].sum() for pack in packs])
        return assign_packs(costs, self._world)

    def _cut(self, share: list[int]) -> list[list[int]]:
        """The packs of a rank in micro-batches."""
        size = self._micro_batch_size
        return [share[start : start + size] for start in range(0, len(share), size)]

    def _collate(self, samples: Sequence[int]) -> Batch:
        return collate([self._examples[i] for i in samples], self._vocab_size)
