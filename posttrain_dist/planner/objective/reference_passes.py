"""The log-probabilities of the reference: by which model, how many bytes, how much on disk.

precomputed    a forward of every sample before step 1; a float32 of each token on disk
adapter_off    a forward of each micro-batch in its step, by the policy without its adapter
frozen         the same by a second copy, whose weights every rank holds whole but for ZeRO-3
"""

from __future__ import annotations

from dataclasses import replace

from posttrain_dist.engine import DeepSpeed
from posttrain_dist.models.folder import read_network
from posttrain_dist.objectives.reference_choice import Reference
from posttrain_dist.planner.job import Job
from posttrain_dist.planner.memory.engines.ds_settings import elements, zero_settings
from posttrain_dist.planner.memory.engines.partitions import shard
from posttrain_dist.planner.memory.parameters import stored_parameters
from posttrain_dist.tuning.full import Full

_NOTHING = "(?!)"  # a pattern that matches no parameter
_BYTES_OF_TOKEN = 4
HOW = {
    Reference.precomputed: "a pass over the samples before step 1",
    Reference.adapter_off: "the policy without its adapter, in every step",
    Reference.frozen: "a second copy, in every step",
}


def reference_job(job: Job) -> Job | None:
    """The run with the model of its reference as its policy; None: it has no reference.

    Unless another model is named it is that of the policy, adapters included.
    """
    if job.objective.reference is None:
        return None
    if job.objective.reference_model is None:
        return job
    network = read_network(job.objective.reference_model)
    return replace(job, network=network, tuning=Full(train=_NOTHING))


def second_model_bytes(job: Job) -> int:
    """Weights of the second model of a rank; 0: there is none. ZeRO-3 shards it, too."""
    other = reference_job(job) if job.objective.has_second_model else None
    if other is None:
        return 0
    stored = stored_parameters(other)
    if not (isinstance(job.engine, DeepSpeed) and job.engine.stage == 3):
        return sum(each.num_bytes for each in stored)
    threshold, total = zero_settings(job).param_persistence_threshold, 0
    for each in stored:
        count = elements(each, job.value_bytes)
        whole = not each.parameter or count <= threshold
        total += each.num_bytes // count * (count if whole else shard(count, job.workers))
    return total


def forgets_order(job: Job) -> bool:
    """Whether ZeRO-3 gathers no weights ahead in the passes of training.

    DeepSpeed looks ahead by the order of the modules of one forward with its backward. Without its
    adapter the policy runs in another order, which that in front of each update replaces; with a
    third micro-batch it is known again. Until then a part of what was gathered ahead for the other
    order stays, so that memory is planned as if the order were known: that is no less.
    """
    stage3 = isinstance(job.engine, DeepSpeed) and job.engine.stage == 3
    off = job.objective.reference is Reference.adapter_off
    return stage3 and off and job.accumulation < 3


def reference_bytes(job: Job) -> int:
    """What the pass before step 1 writes; 0: there is none, or the data is not known."""
    tokens = job.data_tokens if job.objective.precomputes else None
    return (tokens or 0) * _BYTES_OF_TOKEN
