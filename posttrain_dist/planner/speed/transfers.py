"""When in a step the bytes of `traffic.py` are sent, and what waits for them.

What is gathered for forward and backward goes beside them, and so do the reductions of gradients:
at stages 2 and 3 beside every backward, at 0 and 1 beside the last one of an update. New weights
are gathered, or come from the host, when nothing else is left to do.
"""

from __future__ import annotations

from dataclasses import dataclass

from posttrain_dist.engine import DeepSpeed
from posttrain_dist.planner.job import Job
from posttrain_dist.planner.memory.parameters import trained_parameters
from posttrain_dist.planner.speed.traffic import (
    FROM_HOST,
    GATHER_BACKWARD,
    GATHER_FORWARD,
    GATHER_WEIGHTS,
    REDUCE,
    TO_HOST,
    traffic_bytes,
)


@dataclass(frozen=True, slots=True)
class Transfers:
    """Bytes that one rank sends.

    Attributes:
        forward: of one micro-batch, beside each of its forwards; backward: beside its backward.
        last_backward: beside the backward before the update, in place of `backward`.
        update: after the last backward, to other ranks; host_update: to and from the host.
        host: beside all passes of a step, to and from the host.
        updated: parameters that this rank updates.
    """

    forward: float
    backward: float
    last_backward: float
    update: float
    host_update: float
    host: float
    updated: float


def transfers(job: Job) -> Transfers:
    """Of one rank."""
    sent = traffic_bytes(job)
    stage = job.engine.stage if isinstance(job.engine, DeepSpeed) else 0
    batches = job.accumulation
    gathered = sent.get(GATHER_BACKWARD, 0) / batches
    reduced = sent.get(REDUCE, 0)
    trained = sum(each.size for each in trained_parameters(job))
    from_host, to_host = sent.get(FROM_HOST, 0), sent.get(TO_HOST, 0)
    kept = _checkpoints(job) * batches
    return Transfers(
        forward=sent.get(GATHER_FORWARD, 0) / (batches * (1 + job.objective.policy_passes)),
        backward=gathered + (reduced / batches if stage >= 2 else 0.0),
        last_backward=gathered + (reduced / batches if stage >= 2 else reduced),
        update=sent.get(GATHER_WEIGHTS, 0),
        host_update=from_host if stage < 3 else 0.0,
        host=kept + to_host + (from_host if stage == 3 else 0.0),
        updated=trained / (job.workers if stage else 1),
    )


def _checkpoints(job: Job) -> float:
    """The inputs of layers that wait in host memory, there and back."""
    if not job.model.checkpoint_offload:
        return 0.0
    rows = float(job.row_tokens * job.network.shape.hidden_size * job.value_bytes)
    return 2 * rows * job.recomputed_layers
