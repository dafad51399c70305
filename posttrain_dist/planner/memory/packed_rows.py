"""The rows that a run will train on, of data that is prepared: the lengths of their samples.

They are found as the rehearsal finds what it tries (`data/packs/heaviest.py`), in the run's own
packs, and no token is read: about a second for a million samples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from posttrain_dist.config import RunConfig
from posttrain_dist.data.packs.balance import Cost
from posttrain_dist.data.packs.heaviest import MicroBatches, RowMemory, heaviest_rows
from posttrain_dist.data.packs.mixing import make_mixture
from posttrain_dist.data.packs.order import Order
from posttrain_dist.data.packs.packing import Ints
from posttrain_dist.data.prepared.arrays import Examples
from posttrain_dist.models.shape import ModelShape

# Of a run, from its first: the heaviest of as many packs is hardly below that of more.
SCANNED_PACKS, SCANNED_EPOCHS = 1 << 16, 64
_NUM_TIES = 2


class PackedRow(NamedTuple):
    """One row.

    Attributes:
        lengths: tokens of each sample, in their order.
        supervised: tokens with a loss.
        parents: the earlier sample of the row that each follows; -1: none.
    """

    lengths: tuple[int, ...]
    supervised: int
    parents: tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False)
class PackedRows:
    """The heaviest rows of runs on one prepared split; what was found is kept.

    Attributes:
        examples: the training split.
    """

    examples: Examples
    _packs: dict[object, tuple[Order, Ints]] = field(default_factory=dict)
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
        run = (config.seed, data.max_length, data.pack_window, train.batch_size, end, memory)
        if run not in self._packs:
            self._packs[run] = self._sums(config, memory)
        key = (run, train.micro_batch_size, world)
        if key not in self._found:
            units = self.examples.units
            cost = Cost.of_model(shape.hidden_size, shape.num_layers, shape.vocab_size)
            costs = cost.of_units(units)
            split = MicroBatches(costs, train.batch_size, train.micro_batch_size, world)
            order, sums = self._packs[run]
            found = heaviest_rows(order, split, sums[:-_NUM_TIES], sums[-_NUM_TIES:])
            rows = (self._row(numbers) for numbers in found)
            self._found[key] = tuple(dict.fromkeys(rows))
        return self._found[key]

    def _row(self, units: Sequence[int]) -> PackedRow:
        """The samples of some units, laid end to end."""
        examples = self.examples
        samples = [i for unit in units for i in examples.units.samples(unit)]
        parents = [
            place - back if back else -1
            for place, back in enumerate(examples.parents[samples].tolist())
        ]
        lengths = tuple(examples.lengths[samples].tolist())
        return PackedRow(lengths, int(examples.supervised[samples].sum()), tuple(parents))

    def _sums(self, config: RunConfig, memory: RowMemory) -> tuple[Order, Ints]:
        """The packs of a run, and of each the keys of `memory` and what decides among equals."""
        data, train, examples = config.data, config.train, self.examples
        units = examples.units
        order = Order(
            units.lengths,
            max_length=data.max_length,
            window=data.pack_window,
            seed=config.seed,
            batch_size=train.batch_size,
            mixture=make_mixture(data, config.seed, examples),
        )
        most = min(SCANNED_PACKS, SCANNED_EPOCHS * self._least_packs(config, 1.0))
        if train.steps is not None:
            most = min(most, train.steps * train.batch_size)
        elif self._least_packs(config, train.epochs or 1.0, train.tokens) <= most:
            order.settle(None, train.epochs, train.tokens)  # else the end is beyond what is seen
        keys = memory.keys(units)
        return order, order.sums((*keys, units.causal_pairs(), units.supervised), most)

    def _least_packs(self, config: RunConfig, epochs: float, tokens: int | None = None) -> int:
        """Of so many epochs or tokens, if each were full."""
        if tokens is None:
            tokens = math.ceil(epochs * int(self.examples.lengths.sum(dtype=int)))
        return math.ceil(tokens / config.data.max_length)
