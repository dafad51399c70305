"""What the memory of every engine does; `one_process.py` and `zero.py` are those that do it."""

from __future__ import annotations

from typing import Protocol

from posttrain_dist.planner.memory.autograd import Shards


class EngineMemory(Shards, Protocol):
    """Allocates on the ledger of one rank what an engine of `posttrain_dist/engine/` allocates.

    Made of a `Job` and a `Ledger`. Called in the order of a run: `load`; of each micro-batch
    `before_backward` and, while the graph is walked, `gather`, `release` and `gradient`; `update`;
    then `save` and `export`.
    """

    def load(self) -> None:
        """The model is built and attached: what stays, and what building it takes beside that."""

    def before_backward(self, *, last: bool) -> None:
        """A backward begins; `last` of its update."""

    def after_backward(self, *, last: bool) -> None:
        """It has ended: gradients that wait in buckets are reduced."""

    def update(self) -> None:
        """The optimizer step: moments (the first time), temporaries; gradients are gone after."""

    def save(self) -> None:
        """Copies of a checkpoint that stand on the device, and go again."""

    def export(self) -> None:
        """The same of an export: tensors that are made whole, one after the other."""
