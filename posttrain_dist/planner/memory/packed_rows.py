"""The rows that a run will train on, of data that is prepared: the lengths of their samples.

They are found as the rehearsal finds what it tries (`data/packs/heaviest.py`), in the run's own
packs, and no token is read: half a second for a million samples.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from posttrain_dist.config import RunConfig
from posttrain_dist.data.packs.balance import Cost
from posttrain_dist.data.packs.heaviest import MicroBatches, RowMemory, heaviest_rows
from posttrain_dist.data.packs.mixing import make_mixture
from posttrain_dist.data.packs.order import Order
from posttrain_dist.data.prepared.arrays import Examples
from posttrain_dist.models.shape import ModelShape

# Of a run, from its first: the heaviest of as many packs is hardly below that of more.
SCANNED_PACKS, SCANNED_EPOCHS = 1 << 16, 256

_WHOLE = 1 << 48  # of all keys of a split together, in whole numbers


class PackedRow(NamedTuple):
    """One row.

    Attributes:
        lengths: tokens of each sample, in their order.
        supervised: tokens with a loss.
    """

    lengths: tuple[int, ...]
    supervised: int


@dataclass(frozen=True, slots=True, eq=False)
class PackedRows:
    """The heaviest rows of runs on one prepared split; what was found is kept.

    Attributes:
        examples: the training split.
    """

    examples: Examples
    _orders: dict[object, Order] = field(default_factory=dict)
    _found: dict[object, tuple[PackedRow, ...]] = field(default_factory=dict)

    def heaviest(
        self, config: RunConfig, shape: ModelShape, world: int, memory: RowMemory
    ) -> tuple[PackedRow, ...]:
        """The rows of which one takes the most memory of the run, on whichever rank.

        Args:
            config: completed; of the run that the data was prepared for.
            shape: of its model, by which ranks are balanced.
            world: number of ranks.
        """
        data, train = config.data, config.train
        end = (train.steps, train.epochs, train.tokens)
        run = (config.seed, data.max_length, data.pack_window, train.batch_size, end)
        key = (run, train.micro_batch_size, world, memory)
        if key not in self._found:
            if run not in self._orders:
                self._orders[run] = self._order(config)
            self._found[key] = self._find(config, shape, world, memory, self._orders[run])
        return self._found[key]

    def _find(
        self, config: RunConfig, shape: ModelShape, world: int, memory: RowMemory, order: Order
    ) -> tuple[PackedRow, ...]:
        train, supervised = config.train, self.examples.supervised
        lengths = self.examples.lengths.astype(np.int64)
        cost = Cost.of_model(shape.hidden_size, shape.num_layers, shape.vocab_size)
        costs = cost.of(lengths, supervised)
        keys = memory.keys(lengths, supervised)
        # A row with much of each may take more than one that has most of a single key.
        together = _WHOLE * np.mean([key / max(1, int(key.sum())) for key in keys], axis=0)
        packs = self._scanned(config)
        if train.steps is not None:
            packs = min(packs, train.steps * train.batch_size)
        found = heaviest_rows(
            order,
            MicroBatches(costs, train.batch_size, train.micro_batch_size, world),
            keys=(*keys, together.astype(np.int64)),
            ties=(lengths**2, supervised),
            packs=packs,
        )
        rows = (
            PackedRow(tuple(lengths[samples].tolist()), int(supervised[samples].sum()))
            for samples in found
        )
        return tuple(dict.fromkeys(rows))

    def _order(self, config: RunConfig) -> Order:
        data, train = config.data, config.train
        order = Order(
            self.examples.lengths,
            max_length=data.max_length,
            window=data.pack_window,
            seed=config.seed,
            batch_size=train.batch_size,
            mixture=make_mixture(data, config.seed, self.examples),
        )
        packs = self._least_packs(train.epochs or 1.0, train.tokens, data.max_length)
        if train.steps is None and packs <= self._scanned(config):
            order.settle(None, train.epochs, train.tokens)  # else the end is beyond what is seen
        return order

    def _scanned(self, config: RunConfig) -> int:
        """Packs that are looked at."""
        epoch = self._least_packs(1.0, None, config.data.max_length)
        return min(SCANNED_PACKS, SCANNED_EPOCHS * epoch)

    def _least_packs(self, epochs: float, tokens: int | None, max_length: int) -> int:
        """Of so many epochs or tokens, if each were full."""
        if tokens is None:
            tokens = math.ceil(epochs * int(self.examples.lengths.sum(dtype=int)))
        return math.ceil(tokens / max_length)
