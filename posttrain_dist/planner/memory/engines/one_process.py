"""The memory of `engine/single.py` with `engine/master.py`: all of the model on one device."""

from __future__ import annotations

from collections.abc import Sequence

from posttrain_dist.planner.job import Job
from posttrain_dist.planner.memory.engines.base import Call
from posttrain_dist.planner.memory.engines.whole_tensors import touch_most
from posttrain_dist.planner.memory.ledger import Block, Ledger
from posttrain_dist.planner.memory.moments import device_moments
from posttrain_dist.planner.memory.parameters import stored_bytes, trained_parameters
from posttrain_dist.planner.memory.stored import Stored
from posttrain_dist.planner.plan import Item

WIDE = 4
BUCKET_ELEMENTS = 1 << 26  # engine/master.py


class SingleMemory:
    """Parameters, float32 masters of 16-bit ones, moments of AdamW, gradients."""

    def __init__(self, job: Job, ledger: Ledger) -> None:
        self._job, self._ledger = job, ledger
        self._trained = trained_parameters(job)
        self._gradients: dict[str, Block] = {}
        self._has_moments = False

    def load(self) -> None:
        for item, num_bytes in stored_bytes(self._job).items():
            self._ledger.allocate(item, num_bytes)
        if self._job.value_bytes < WIDE:
            self._ledger.allocate(Item.master, WIDE * sum(each.size for each in self._trained))

    def gather(self, parameters: Sequence[str], *, backward: bool) -> None:
        """Nothing: they are here."""

    def release(self, parameters: Sequence[str], *, backward: bool) -> None:
        """Nothing."""

    def run(
        self, prefix: str, calls: Sequence[Call], taken: Sequence[int], *, backward: bool
    ) -> None:
        """Every parameter is whole all the time."""
        touch_most(self._ledger, taken)

    def gradient(self, parameter: str, block: Block) -> None:
        if parameter in self._gradients:  # of another micro-batch: added in place
            self._ledger.release(block)
        else:
            self._gradients[parameter] = block

    def before_backward(self, *, last: bool) -> None:
        """Nothing."""

    def after_backward(self, *, last: bool) -> None:
        """Nothing."""

    def update(self) -> None:
        for bucket in _buckets(self._trained, whole=self._job.value_bytes == WIDE):
            wide = [self._widened(each) for each in bucket]
            if not self._has_moments:
                moments = sum(device_moments(self._job, each.size) for each in bucket)
                self._ledger.allocate(Item.moments, moments)
            for block in wide:
                if block is not None:
                    self._ledger.release(block)
        self._has_moments = True

    def save(self) -> None:
        """The tensors themselves are written; what an adapter trains goes to the host first."""
        if not self._job.tuning.whole_model and not self._job.on_gpu:
            self._ledger.touch(Item.saving, 3 * WIDE * sum(each.size for each in self._trained))

    def export(self) -> None:
        """Nothing: one after the other, as they are."""

    def _widened(self, each: Stored) -> Block | None:
        """The gradient in float32; a 16-bit one goes as its copy is made."""
        block = self._gradients.pop(each.name, None)
        if block is None or self._job.value_bytes == WIDE:
            return block
        wide = self._ledger.allocate(Item.workspace, each.size * WIDE)
        self._ledger.release(block)
        return wide


def _buckets(trained: Sequence[Stored], *, whole: bool) -> Sequence[Sequence[Stored]]:
    """Updated together: all where they are float32, else up to BUCKET_ELEMENTS."""
    if whole:
        return [trained] if trained else []
    found: list[list[Stored]] = []
    size = BUCKET_ELEMENTS
    for each in trained:
        if size + each.size > BUCKET_ELEMENTS:
            found.append([])
            size = 0
        found[-1].append(each)
        size += each.size
    return found
