"""How long a step takes, and the whole run.

GPU       products / rate + attention / rate + bytes moved / memory's speed, one after another
pass      the longest of GPU, starting its kernels, and what is sent beside it, plus a quarter of
          what is hidden, for products are slower beside a collective; and the first gather
step      forward and backward of every micro-batch, what nothing hides, and the update
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from posttrain_dist.engine import DeepSpeed
from posttrain_dist.engine.ds_tuning import LARGEST_LEAF_ELEMENTS
from posttrain_dist.planner.job import Job
from posttrain_dist.planner.memory.disk import checkpoint_bytes
from posttrain_dist.planner.objective.reference_passes import forgets_order, reference_job
from posttrain_dist.planner.plan import Speed
from posttrain_dist.planner.speed.intervals import checkpoint_interval, effective_share
from posttrain_dist.planner.speed.rates import LAUNCH_S, WAITING, Rates, num_nodes, rates_of
from posttrain_dist.planner.speed.traffic import traffic_bytes
from posttrain_dist.planner.speed.transfers import Transfers, transfers
from posttrain_dist.planner.speed.work import MicroBatch, Work, alone, micro_batch, model_flops

BILLION = 10**9
_HIDDEN_COST = 0.25  # of what runs beside products
_HOOK_S = 80e-6  # of ZeRO-3, of each module that has weights, in each pass
_START_S = 180.0  # until a run that failed is placed, has its programs and its data again


@dataclass(frozen=True, slots=True)
class StepTime:
    """Of one step.

    Attributes:
        terms: seconds that each kind of work takes by itself: what hides behind another counts
            too, so that a step is shorter than their sum.
    """

    step_s: float
    terms: dict[str, float]

    @property
    def binds(self) -> str:
        """The term that is longest."""
        return max(self.terms, key=lambda name: self.terms[name])


def speed_of(job: Job) -> Speed:
    """Seconds, tokens and hours of a run, and how often it should write a checkpoint.

    Hours are of training alone: `effective_share` says what checkpoints and failures leave of it.
    """
    rates, time = rates_of(job), step_time(job)
    tokens_per_step = job.batch_size * job.config.data.max_length
    tokens_per_s = tokens_per_step / time.step_s
    hours = (job.tokens if job.tokens is not None else BILLION) / tokens_per_s / 3600
    peak = rates.peak_flops * job.workers
    failure_s = job.machine.node_failure_s / num_nodes(job)
    checkpoint_s = checkpoint_bytes(job) / rates.storage
    interval_s = checkpoint_interval(checkpoint_s, failure_s)
    restart_s = checkpoint_s + _START_S
    return Speed(
        step_s=time.step_s,
        terms=time.terms,
        binds=time.binds,
        tokens_per_step=tokens_per_step,
        tokens_per_s=tokens_per_s,
        model_flops_share=model_flops(job) * tokens_per_s / peak,
        tokens=job.tokens,
        hours=hours,
        gpu_hours=hours * job.workers,
        traffic_bytes=traffic_bytes(job),
        checkpoint_s=checkpoint_s,
        checkpoint_every_s=interval_s,
        effective_share=effective_share(interval_s, checkpoint_s, failure_s, restart_s),
        reference_s=reference_pass_s(job),
        reference_tokens=job.data_tokens if job.objective.precomputes else None,
    )


def step_time(job: Job) -> StepTime:
    """Seconds of one step of the rank that has most to do."""
    rates, sent, batch = rates_of(job), transfers(job), micro_batch(job)
    # Its last micro-batch may have fewer packs than the others.
    packs = -(-job.batch_size // job.workers)
    full = packs * job.config.data.max_length / job.row_tokens
    again = max(full, 1.0) if job.accumulation > 1 else 1.0
    layers = len(job.network.layers)
    messages = 2 * layers * rates.latency_s if isinstance(job.engine, DeepSpeed) else 0.0

    def network_s(num_bytes: float) -> float:
        return num_bytes / rates.collective + messages if num_bytes else 0.0

    hooks = _hooks_s(job)
    of = partial(_Pass.of, rates=rates, hooks_s=hooks, hides=not forgets_order(job))
    forward = of(batch.forward, network_s=network_s(sent.forward))
    backward = of(batch.backward, network_s=network_s(sent.backward))
    last = of(batch.backward, network_s=network_s(sent.last_backward))
    passes = again * forward.seconds + (again - 1) * backward.seconds + last.seconds
    references = _references_s(job, batch, rates, network_s(sent.forward))
    passes += again * references
    # Copies to the host and back run beside the passes as collectives do.
    host_s = sent.host / rates.host_link
    shown = max(0.0, host_s - passes) + _HIDDEN_COST * min(host_s, passes)
    update_s, on_host_s = _update_s(job, sent, rates)
    on_host_s += sent.host_update / rates.host_link
    gathered = network_s(sent.update)
    first = (forward.network_s + backward.network_s) / max(1, layers) * again
    step_s = passes * _waiting(job) + shown + first + gathered + update_s + on_host_s
    terms = {
        "reference": again * references,
        "compute": again * (forward.compute_s + last.compute_s),
        "memory": again * (forward.memory_s + last.memory_s),
        "kernel starts": again * (forward.start_s + last.start_s),
        "network": again * forward.network_s
        + (again - 1) * backward.network_s
        + last.network_s
        + gathered,
        "update": update_s,
        "offload": host_s + on_host_s,
    }
    return StepTime(step_s, {name: seconds for name, seconds in terms.items() if seconds})


def _references_s(job: Job, batch: MicroBatch, rates: Rates, gathering_s: float) -> float:
    """Of the forwards without gradients of one micro-batch; weights of the policy are gathered."""
    own, total = job.objective.policy_passes, 0.0
    for i, work in enumerate(batch.passes):
        network_s, hooks_s = (gathering_s, _hooks_s(job)) if i < own else (0.0, 0.0)
        total += _Pass.of(work, rates, network_s, hooks_s).seconds
    return total


def reference_pass_s(job: Job) -> float:
    """Of the pass over all samples before step 1, all ranks at once; 0: there is none.

    Where the data is not known, it is of a billion tokens.
    """
    other = reference_job(job) if job.objective.precomputes else None
    if other is None:
        return 0.0
    gathers = isinstance(job.engine, DeepSpeed) and job.engine.stage == 3
    sent = transfers(job).forward if gathers and not job.objective.has_second_model else 0.0
    rates = rates_of(job)
    seconds = _Pass.of(alone(other), rates, sent / rates.collective, 0.0).seconds
    rows = (job.data_tokens or BILLION) / (job.row_tokens * job.workers)
    return rows * seconds


@dataclass(frozen=True, slots=True)
class _Pass:
    compute_s: float
    memory_s: float
    start_s: float
    network_s: float
    hides: bool = True  # what is sent goes beside the work

    @classmethod
    def of(
        cls, work: Work, rates: Rates, network_s: float, hooks_s: float, *, hides: bool = True
    ) -> _Pass:
        compute_s = work.products / rates.products + work.attention / rates.attention
        starts_s = work.kernels * LAUNCH_S + hooks_s
        return cls(compute_s, work.moved / rates.memory, starts_s, network_s, hides)

    @property
    def seconds(self) -> float:
        """Of the pass, with what cannot hide."""
        device_s = max(self.compute_s + self.memory_s, self.start_s)
        if not self.hides:
            return device_s + self.network_s
        hidden_s = min(device_s, self.network_s)
        return max(device_s, self.network_s) + _HIDDEN_COST * hidden_s


def _hooks_s(job: Job) -> float:
    """Of one pass: what ZeRO-3 does in Python around every module."""
    if not isinstance(job.engine, DeepSpeed) or job.engine.stage < 3:
        return 0.0
    modules = sum(
        1 if layer.size <= LARGEST_LEAF_ELEMENTS else len(layer.linears) + len(layer.others)
        for layer in job.network.layers
    )
    return modules * _HOOK_S


def _update_s(job: Job, sent: Transfers, rates: Rates) -> tuple[float, float]:
    """Norm, clipping and AdamW of the parameters of one rank: on its device, and on its host."""
    if isinstance(job.engine, DeepSpeed) and job.engine.offload:
        return 0.0, sent.updated / rates.cpu_adam
    # Gradients are read for their norm; master, moments and gradients are read, all but the last
    # written, and the weights.
    moments = 2 * job.optimizer.state_bits / 8
    master = 4 if job.value_bytes == 2 else 0
    num_bytes = 2 * (moments + master) + 4 * job.value_bytes + 8
    return sent.updated * num_bytes / rates.memory, 0.0


def _waiting(job: Job) -> float:
    """Ranks wait for the slowest one: of more nodes it is slower."""
    doublings = max(0, (num_nodes(job) - 1).bit_length())
    return 1 + WAITING * doublings
