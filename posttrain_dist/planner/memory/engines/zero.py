"""DeepSpeed's stages, each by its own file."""

from __future__ import annotations

from posttrain_dist.engine import DeepSpeed
from posttrain_dist.planner.job import Job
from posttrain_dist.planner.memory.engines.base import EngineMemory
from posttrain_dist.planner.memory.engines.zero0 import ReplicatedMemory
from posttrain_dist.planner.memory.engines.zero3 import ShardedMemory
from posttrain_dist.planner.memory.engines.zero12 import FlatMemory
from posttrain_dist.planner.memory.ledger import Ledger


def zero_memory(job: Job, ledger: Ledger) -> EngineMemory:
    """What a rank holds under the stage of the job; of the fullest rank, where ranks differ."""
    assert isinstance(job.engine, DeepSpeed)
    if job.engine.stage == 0:
        return ReplicatedMemory(job, ledger)
    if job.engine.stage == 3:
        return ShardedMemory(job, ledger)
    return FlatMemory(job, ledger)
