"""What a run writes: one checkpoint, the export.

A checkpoint of a model that is trained itself is the engine's own files: 16-bit weights, float32
masters and moments, 14 bytes a parameter, or 12 in float32 on one rank, where a weight is its own
master. Of anything else it is `trained.safetensors`: 12 bytes of each trained number, and what else
the tuning keeps.
"""

from __future__ import annotations

from functools import lru_cache

from posttrain_dist.engine import DeepSpeed
from posttrain_dist.planner.job import Job
from posttrain_dist.planner.memory.engines.ds_settings import elements, zero_settings
from posttrain_dist.planner.memory.engines.partitions import flat_groups, shard, sub_groups
from posttrain_dist.planner.memory.moments import device_moments, host_moments
from posttrain_dist.planner.memory.parameters import (
    Stored,
    kept_as_they_are,
    stored_parameters,
    trained_parameters,
)

_STATE_BYTES = 12  # master and two moments in float32
_STEP_BYTES = 4


@lru_cache(maxsize=8)
def checkpoint_bytes(job: Job) -> int:
    """Of one checkpoint, all ranks together; without headers and small files."""
    if not job.tuning.whole_model:
        return _kept_bytes(job)
    engine = job.engine
    if not isinstance(engine, DeepSpeed):
        return _whole_bytes(job)
    if engine.stage == 0:
        return _whole_bytes(job)
    if engine.stage < 3:
        return _flat_bytes(job, engine.stage)
    return _sharded_bytes(job)


def export_bytes(job: Job) -> int:
    """Of the weights that are written at the end: the model, or the adapter."""
    if not job.config.checkpoint.export:
        return 0
    return sum(
        each.size * job.value_bytes
        for each in stored_parameters(job)
        if job.tuning.whole_model or each.trained
    )


def _kept_bytes(job: Job) -> int:
    state = (each.size * 4 + _moment_bytes(job, each.size) for each in trained_parameters(job))
    return kept_as_they_are(job) + sum(each + _STEP_BYTES for each in state)


def _moment_bytes(job: Job, size: int) -> int:
    return device_moments(job, size) + host_moments(job, size)


def _whole_bytes(job: Job) -> int:
    """Weights, and of what is trained the moments and, in 16 bits, a master."""
    master = 4 if job.value_bytes < 4 else 0
    return sum(
        each.num_bytes
        + each.trained * (each.size * master + _moment_bytes(job, each.size) + _STEP_BYTES)
        for each in stored_parameters(job)
    )


def _flat_bytes(job: Job, stage: int) -> int:
    """Rank 0 writes the flat weights; each rank its part of masters and moments."""
    groups = flat_groups(job)
    written = sum(group.numel * job.value_bytes for group in groups)
    written += sum(_flat_state_bytes(job, group.numel) for group in groups)
    frozen = [each for each in stored_parameters(job) if not each.trained]
    copies = 2 if stage == 2 and job.on_gpu else 1  # stage 2 lists them apart, too
    return written + copies * sum(each.num_bytes for each in frozen)


def _flat_state_bytes(job: Job, numel: int) -> int:
    return numel * _STATE_BYTES + job.workers * _STEP_BYTES


def _sharded_bytes(job: Job) -> int:
    """Each rank writes its shards of masters and moments, and of what is frozen."""
    settings = zero_settings(job)
    groups = sub_groups(job, settings.sub_group_size)
    state = sum(
        shard(each.size, job.workers) * job.workers * _STATE_BYTES
        for group in groups
        for each in group
    )
    state += len(groups) * job.workers * _STEP_BYTES
    frozen = sum(
        shard(elements(each, job.value_bytes), job.workers) * job.workers * _width(each, job)
        for each in stored_parameters(job)
        if each.parameter and not each.trained
    )
    return state + frozen


def _width(stored: Stored, job: Job) -> int:
    return stored.num_bytes // elements(stored, job.value_bytes)
