"""Job -> Plan: memory phase by phase, disk, time, and what should be said of it."""

from __future__ import annotations

import math

from posttrain_dist.config.this_machine import trains_here
from posttrain_dist.models import Checkpointing
from posttrain_dist.planner.job import Job
from posttrain_dist.planner.memory.allocator import context_bytes, slack_bytes
from posttrain_dist.planner.memory.disk import checkpoint_bytes, export_bytes
from posttrain_dist.planner.memory.host import (
    host_context_bytes,
    host_phases,
    resident_bytes,
    resuming_bytes,
)
from posttrain_dist.planner.memory.parameters import trained_parameters
from posttrain_dist.planner.memory.phases import device_phases, state_bytes
from posttrain_dist.planner.methods import engine_name, tuning_name
from posttrain_dist.planner.objective.reference_passes import HOW, forgets_order, reference_bytes
from posttrain_dist.planner.plan import Memory, Plan
from posttrain_dist.planner.speed.step_time import speed_of

_BUSY = 0.9  # of the workers, in the mean of a step: below it a sentence says so


def make_plan(job: Job, overrides: tuple[str, ...] = ()) -> Plan:
    """The whole plan of a run.

    Args:
        overrides: the words of a command line that make this run of the given one.
    """
    phases = device_phases(job)
    device = Memory(phases, slack_bytes(job, phases), context_bytes(job))
    host = Memory(host_phases(job), context_bytes=host_context_bytes(job))
    return Plan(
        settings=settings_of(job),
        overrides=overrides,
        hardware=hardware_of(job),
        parameters=job.network.num_parameters,
        trained=sum(each.size for each in trained_parameters(job)),
        workers=job.workers,
        nodes=math.ceil(job.workers / job.local_workers),
        device=device,
        host=host,
        capacity_bytes=_capacity_bytes(job),
        margin_bytes=_margin_bytes(job),
        host_capacity_bytes=job.machine.host_memory_bytes,
        checkpoint_bytes=checkpoint_bytes(job),
        export_bytes=export_bytes(job),
        reference_bytes=reference_bytes(job),
        speed=speed_of(job),
        on_gpu=job.on_gpu,
        warnings=warnings_of(job),
    )


def may_fit(job: Job) -> bool:
    """Whether what a run takes in any case has room. If not, its plan does not fit; else it may."""
    if resident_bytes(job) > job.machine.host_memory_bytes:
        return False
    least = state_bytes(job) + context_bytes(job)
    return least <= _capacity_bytes(job) - _margin_bytes(job)


def _capacity_bytes(job: Job) -> int:
    """Of a GPU; ranks without one share the memory of their node."""
    machine = job.machine
    if job.on_gpu:
        return machine.gpu_memory_bytes
    return machine.host_memory_bytes // job.local_workers


def _margin_bytes(job: Job) -> int:
    return math.ceil(job.machine.gpu_memory_bytes * job.machine.margin) if job.on_gpu else 0


def warnings_of(job: Job) -> tuple[str, ...]:
    """What of a run costs more than anybody wants, and is seen without another plan."""
    found = []
    if job.workers > job.batch_size:
        idle = job.workers - job.batch_size
        found.append(
            f"a step has {job.batch_size} packs for {job.workers} workers: {idle} only "
            f"wait; train.batch_size={job.workers} would be a pack for each"
        )
    packs = math.ceil(job.batch_size / job.workers)
    if job.micro_batch_size > packs:
        found.append(
            f"train.micro_batch_size is {job.micro_batch_size}, and a rank has {packs} of the "
            f"{job.batch_size} packs of a step: so many run at once"
        )
    busy = job.batch_size / (job.workers * packs)
    if packs > 1 and busy < _BUSY:
        found.append(
            f"{job.batch_size} packs of a step do not divide by {job.workers} workers: some wait "
            f"for those that have {packs}, and {1 - busy:.0%} of the time is lost; "
            f"train.batch_size={job.workers * packs} would be {packs} for each"
        )
    if forgets_order(job):
        found.append(
            "the reference runs the policy without its adapter in every step, after which ZeRO-3 "
            "gathers no weights ahead: objective.reference=precomputed trains faster"
        )
    asked = getattr(job.config.cluster, "workers", None)
    gpus = job.machine.gpus_per_node * getattr(job.config.cluster, "nodes", 1)
    if job.on_gpu and asked is None and job.workers < gpus:
        found.append(f"{job.workers} of {gpus} GPUs works; cluster=ray engine=auto takes them all")
    if job.workers > job.local_workers and trains_here(job.config.cluster):
        found.append(
            f"{job.workers} workers take more nodes than this machine: set cluster.address of a "
            "Ray cluster that has them, or cluster=slurm with cluster.nodes"
        )
    share, cpus = getattr(job.config.cluster, "cpus_per_worker", 0.0), job.machine.cpus_per_node
    if job.local_workers * share > cpus:
        found.append(
            f"{job.local_workers} workers with {share:g} CPUs each are more than a node of {cpus} "
            f"CPUs starts: set cluster.cpus_per_worker to at most {cpus / job.local_workers:.2g}"
        )
    if not job.on_gpu:
        found.append("on a CPU times are rough: a factor of two")
    resuming, has = resuming_bytes(job), job.machine.host_memory_bytes
    if resuming > has:
        found.append(
            f"to go on from a checkpoint would take {_gib(resuming)} of a host of {_gib(has)}, for "
            "DeepSpeed reads it whole on every rank: it needs a larger host, or fewer ranks on each"
        )
    return tuple(found)


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:,.0f} GiB"


def settings_of(job: Job) -> dict[str, str]:
    """What the run is, for readers."""
    facts, compared = job.objective, {}
    if facts.compares:
        compared = {"objective": facts.name}
    if facts.reference is not None:
        name = facts.reference_model or "what training starts with"
        compared["reference"] = f"{name}: {HOW[facts.reference]}"
    return {
        "model": f"{job.config.model.path} ({job.network.shape.model_type})",
        **compared,
        "tuning": tuning_text(job),
        "optimizer": optimizer_text(job),
        "engine": engine_name(job.config),
        "data.max_length": f"{job.config.data.max_length:,}",
        "packs of a step": f"{job.batch_size:,}",
        "micro-batch": f"{_row_packs(job)} packs, {job.accumulation} a step",
        "checkpointing": checkpointing_text(job),
        "attention": job.attention,
        "dtype": "bfloat16" if job.value_bytes == 2 else "float32",
    }


def _row_packs(job: Job) -> int:
    """Packs of one micro-batch, of the rank that has most."""
    return min(job.micro_batch_size, math.ceil(job.batch_size / job.workers))


def tuning_text(job: Job) -> str:
    """As "QLoRA (rank 16)"."""
    values = job.config.to_dict()["tuning"]
    size = next((f"{name} {values[name]}" for name in ("rank", "tokens") if values.get(name)), "")
    return f"{tuning_name(job.config)}{f' ({size})' * bool(size)}"


def optimizer_text(job: Job) -> str:
    """As "paged adamw, 8 bits"."""
    optimizer = job.optimizer
    return f"{'paged ' * optimizer.paged}adamw, {optimizer.state_bits} bits"


def checkpointing_text(job: Job) -> str:
    """As "48 of 80 layers"."""
    if job.model.activation_checkpointing is Checkpointing.selective:
        return f"{job.recomputed_layers} of {len(job.network.layers)} layers"
    return job.model.activation_checkpointing.name


def hardware_of(job: Job) -> dict[str, str]:
    """What one node has, for readers."""
    machine, gib = job.machine, 1 << 30
    shown = {"node": "no GPU"}
    if machine.gpu is not None:
        memory = machine.gpu_memory_bytes / gib
        shown = {"node": f"{machine.gpus_per_node} x {machine.gpu} ({memory:.4g} GiB)"}
    shown["host memory"] = f"{machine.host_memory_bytes / gib:.4g} GiB"
    return shown
