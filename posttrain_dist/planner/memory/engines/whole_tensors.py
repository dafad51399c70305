"""What engines do with whole tensors, in a forward and in saving."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from posttrain_dist.planner.job import Job
from posttrain_dist.planner.memory.ledger import Block, Ledger
from posttrain_dist.planner.memory.parameters import kept_as_they_are, trained_parameters
from posttrain_dist.planner.plan import Item

_STATE_TENSORS = 3  # master and two moments


def release_all(ledger: Ledger, blocks: Iterable[Block]) -> None:
    """One holder less of each."""
    for block in list(blocks):
        ledger.release(block)


def touch_most(ledger: Ledger, taken: Sequence[int]) -> None:
    """What a layer takes in a forward where nothing is gathered: the fullest moment is enough."""
    most = max(taken, default=0)
    if most > 0:
        ledger.touch(Item.activations, most)


def touch_whole_state(job: Job, ledger: Ledger) -> None:
    """A small tuning's checkpoint: master and moments of one parameter after the other, whole.

    As `engine/ds_state.py` gathers them: float32, and rank 0, which is the fullest one, copies them
    to the host, where on a CPU they stay until the file is written.
    """
    if job.tuning.whole_model:
        return
    trained = trained_parameters(job)
    largest = max(each.size for each in trained) * 4 * _STATE_TENSORS
    kept = 0
    if not job.on_gpu:
        kept = sum(each.size for each in trained) * 4 * _STATE_TENSORS + kept_as_they_are(job)
    ledger.touch(Item.saving, largest + kept)
