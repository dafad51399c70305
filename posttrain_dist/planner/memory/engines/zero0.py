"""Stage 0: plain data parallelism; in bfloat16 with float32 masters beside the weights.

After deepspeed 0.19.8: runtime/engine.py (buffered_allreduce_fallback) and, in bfloat16,
runtime/fp16/unfused_optimizer.py, which makes all float32 gradients before it updates.
"""

from __future__ import annotations

from collections.abc import Sequence

from posttrain_dist.planner.job import Job
from posttrain_dist.planner.memory.engines.base import Call
from posttrain_dist.planner.memory.engines.whole_tensors import (
    release_all,
    touch_most,
    touch_whole_state,
)
from posttrain_dist.planner.memory.ledger import Block, Ledger
from posttrain_dist.planner.memory.parameters import stored_bytes, trained_parameters
from posttrain_dist.planner.plan import Item

_REDUCED_ELEMENTS = 500_000_000  # that engine.py reduces at a time


class ReplicatedMemory:
    """What a rank of stage 0 holds, on a ledger of its device."""

    def __init__(self, job: Job, ledger: Ledger) -> None:
        self._job, self._ledger = job, ledger
        self._trained = {s.name: s for s in trained_parameters(job)}
        self._gradients: dict[str, Block] = {}
        self._has_moments = False

    def load(self) -> None:
        """Weights, masters; in bfloat16 also an update with zeros, whose moments go again."""
        job, ledger = self._job, self._ledger
        for item, num_bytes in stored_bytes(job).items():
            ledger.allocate(item, num_bytes)
        if job.value_bytes == 4:
            return
        count = self._count()
        ledger.allocate(Item.master, count * 4)
        gradients = ledger.allocate(Item.gradients, count * (job.value_bytes + 4))
        ledger.touch(Item.moments, count * 8)
        ledger.release(gradients)

    def gather(self, parameters: Sequence[str], *, backward: bool) -> None:
        """Every parameter is whole."""

    def release(self, parameters: Sequence[str], *, backward: bool) -> None:
        """Every parameter stays whole."""

    def run(
        self, prefix: str, calls: Sequence[Call], taken: Sequence[int], *, backward: bool
    ) -> None:
        """Every parameter is whole all the time."""
        touch_most(self._ledger, taken)

    def before_backward(self, *, last: bool) -> None:
        """Gradients are added up where they are."""

    def gradient(self, parameter: str, block: Block) -> None:
        """Kept, or added to what there is."""
        if parameter in self._gradients:
            self._ledger.release(block)
        else:
            self._gradients[parameter] = block

    def after_backward(self, *, last: bool) -> None:
        """Gradients are averaged in copies of half a thousand million elements."""
        if not last:
            return
        most = filled = count = 0
        for each in self._trained.values():
            filled, count = filled + each.size, count + 1
            most = max(most, filled if count > 1 else 0)
            if filled > _REDUCED_ELEMENTS:
                filled = count = 0
        self._ledger.touch(Item.buckets, most * self._job.value_bytes)

    def update(self) -> None:
        """AdamW on float32 gradients; those of the weights go after it."""
        ledger, job = self._ledger, self._job
        wide = None
        if job.value_bytes < 4:
            wide = ledger.allocate(Item.gradients, self._count() * 4)
        if not self._has_moments:
            ledger.allocate(Item.moments, self._count() * 8)
            self._has_moments = True
        if wide is not None:
            ledger.release(wide)
        release_all(ledger, self._gradients.values())
        self._gradients.clear()

    def save(self) -> None:
        """Copies of a checkpoint on the device: of small tunings, one parameter's state whole."""
        touch_whole_state(self._job, self._ledger)

    def export(self) -> None:
        """Every parameter is whole as it is."""

    def _count(self) -> int:
        return sum(each.size for each in self._trained.values())
