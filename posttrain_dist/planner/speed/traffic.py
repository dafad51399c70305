"""Bytes that one GPU sends in one step, by what for. Rings, as NCCL's large messages go.

An all-reduce of N bytes over w ranks sends 2 (w - 1) / w N from each, a gather or a
reduce-scatter (w - 1) / w N (Rajbhandari et al., arXiv:1910.02054, section 7). Of a ring that goes
through n nodes, the GPU at the edge of a node sends all of it over the network.
"""

from __future__ import annotations

from posttrain_dist.engine import DeepSpeed
from posttrain_dist.planner.job import Job, shared_by
from posttrain_dist.planner.memory.engines.ds_settings import elements, zero_settings
from posttrain_dist.planner.memory.engines.partitions import shard
from posttrain_dist.planner.memory.parameters import stored_parameters, trained_parameters

GATHER_FORWARD = "gather, forward"
GATHER_BACKWARD = "gather, backward"
GATHER_WEIGHTS = "gather, updated weights"
REDUCE = "reduce gradients"
TO_HOST = "gradients to the host"
FROM_HOST = "weights from the host"


def traffic_bytes(job: Job) -> dict[str, int]:
    """What one GPU sends in one step: to other GPUs, and, where it offloads, over its host link."""
    if not isinstance(job.engine, DeepSpeed):
        return {}
    stage, workers = job.engine.stage, job.workers
    ring = (workers - 1) / workers
    trained = sum(each.size for each in trained_parameters(job))
    gradients = trained * job.value_bytes
    found: dict[str, int] = {}
    if workers > 1:
        found = _between_ranks(job, stage, ring, gradients)
    if zero_settings(job).offload_optimizer:
        found |= _over_host_link(job, stage, gradients)
    return found


def _between_ranks(job: Job, stage: int, ring: float, gradients: int) -> dict[str, int]:
    if stage < 3:
        # Gradients are all-reduced at 1 and 2 as well: each rank then takes its part.
        often = job.accumulation if stage == 2 else 1
        found = {REDUCE: round(2 * ring * gradients * often)}
        return found | ({GATHER_WEIGHTS: round(ring * gradients)} if stage else {})
    settings = zero_settings(job)
    gathered, again = _gathered_bytes(job, settings.param_persistence_threshold)
    scattered = 1 if settings.reduce_scatter else 2
    forwards = 1 + job.objective.policy_passes
    return {
        GATHER_FORWARD: round(ring * gathered * job.accumulation * forwards),
        GATHER_BACKWARD: round(ring * again * job.accumulation),
        REDUCE: round(scattered * ring * gradients * job.accumulation),
    }


def _over_host_link(job: Job, stage: int, gradients: int) -> dict[str, int]:
    part = gradients // job.workers
    if stage < 3:
        return {TO_HOST: part * (2 * job.accumulation - 1), FROM_HOST: part}
    gathered, _ = _gathered_bytes(job, zero_settings(job).param_persistence_threshold)
    whole = gathered // job.workers
    return {
        TO_HOST: part * (2 * job.accumulation - 1),
        FROM_HOST: 2 * whole * job.accumulation,
    }


@shared_by("parameters_key", "workers")
def _gathered_bytes(job: Job, threshold: int) -> tuple[int, int]:
    """Of what stage 3 shards, with its padding; what is no larger than a threshold stays whole.

    Returns:
        Those of a forward and of a backward: frozen embeddings have none.
    """
    first = {each.name for each in job.network.before}
    total = again = 0
    for each in stored_parameters(job):
        count = elements(each, job.value_bytes)
        if each.parameter and count > threshold:
            padded = shard(count, job.workers) * job.workers * (each.num_bytes // count)
            total += padded
            again += padded if each.trained or each.name not in first else 0
    return total, again
