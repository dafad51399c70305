"""What the memory of every engine does; `one_process.py` and `zero.py` are those that do it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from posttrain_dist.planner.memory.ledger import Block


class Call(NamedTuple):
    """An operation that reads parameters: their names, and those trained with bytes of gradient."""

    gathers: Sequence[str]
    parameters: Sequence[tuple[str, int]]


class Shards(Protocol):
    """What an engine does around operations; the memory side of `engine/`."""

    def gather(self, parameters: Sequence[str], *, backward: bool) -> None:
        """Before a module runs: its parameters become whole (ZeRO-3)."""

    def release(self, parameters: Sequence[str], *, backward: bool) -> None:
        """After it ran."""

    def gradient(self, parameter: str, block: Block) -> None:
        """A gradient of the whole parameter was made; the engine is its holder from here on."""

    def run(
        self, prefix: str, calls: Sequence[Call], taken: Sequence[int], *, backward: bool
    ) -> None:
        """Gather and release for calls that make no gradients: only the fullest moment counts.

        Args:
            prefix: of the names of their parameters.
            taken: bytes that their layer takes for a moment: before the first call, while it runs,
                before the second, ...
        """


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
