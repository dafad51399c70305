"""What the fullest host holds: all its ranks together, and the one that writes for all.

    load      weights come mapped from safetensors: pages of the file, which every rank shares and
              the kernel takes back. Only where the run's dtype is another one, or weights are
              random, every rank has copies (measured: 0.4 MB private of 337 MB as stored, all of
              it in float32). Stage 3 takes its shards through the host, stages 1 and 2 their flat
              weights, where a GPU has no room for them twice
    training  of ZeRO's offload: masters, moments, gradients, and at stage 3 the weights; inputs of
              recomputed layers (`model.checkpoint_offload`); paged moments, at worst all of them
    save      `torch.save` brings one tensor after the other from the GPU; of a small tuning rank 0
              holds everything that is written
    export    rank 0 fills one file of 4 GiB after the other

On CPUs the host holds what its ranks allocate. Pinned memory comes in powers of two
(`CachingHostAllocator` of torch).
"""

from __future__ import annotations

from collections import Counter
from functools import lru_cache

from posttrain_dist.engine import DeepSpeed
from posttrain_dist.models import Weights
from posttrain_dist.planner.job import Job
from posttrain_dist.planner.memory.engines.ds_settings import elements, zero_settings
from posttrain_dist.planner.memory.engines.partitions import flat_groups, shard, sub_groups
from posttrain_dist.planner.memory.moments import host_moments
from posttrain_dist.planner.memory.parameters import (
    Stored,
    kept_as_they_are,
    stored_parameters,
    trained_parameters,
)
from posttrain_dist.planner.plan import Item, Phase, PhaseName

_EXPORT_FILE_BYTES = 4 << 30  # as checkpoint/hf_folder.py
_MIB = 1 << 20
# Private memory of a rank after its imports (torch, transformers, deepspeed), measured on a CPU;
# with CUDA the driver's and its libraries' too. Ray's head, the driver, its object store.
_RANK_BYTES, _CUDA_RANK_BYTES, _NODE_BYTES = 700 * _MIB, 2_500 * _MIB, 1_500 * _MIB
_DTYPES = {"bfloat16": 2, "float16": 2, "float32": 4}


def host_context_bytes(job: Job) -> int:
    """Of the programs themselves: every rank's Python, Ray, the driver."""
    each = _CUDA_RANK_BYTES if job.on_gpu else _RANK_BYTES
    return _NODE_BYTES + job.local_workers * each


def host_phases(job: Job) -> tuple[Phase, ...]:
    """The fullest moment of each phase, of the host of rank 0."""
    if not job.on_gpu:
        from posttrain_dist.planner.memory.phases import device_phases

        ranks = job.local_workers
        return tuple(
            Phase(phase.name, {item: n * ranks for item, n in phase.items.items()})
            for phase in device_phases(job)
        )
    resident = _resident(job)
    moments = {
        PhaseName.load: {Item.loading: max(_loading(job), _moved(job) * job.local_workers)},
        PhaseName.reference: {},
        PhaseName.forward: _kept_inputs(job),
        PhaseName.backward: _kept_inputs(job),
        PhaseName.update: {},
        PhaseName.evaluate: {},
        PhaseName.save: {Item.saving: _saving(job)},
        PhaseName.export: {Item.saving: _exporting(job)},
    }
    if not job.evaluates:
        del moments[PhaseName.evaluate]
    if job.objective.reference is None:
        del moments[PhaseName.reference]
    return tuple(
        Phase(name, {item: n for item, n in (Counter(resident) + Counter(more)).items() if n})
        for name, more in moments.items()
    )


def resident_bytes(job: Job) -> int:
    """What is there from start to end, the programs too; on CPUs not what ranks allocate."""
    resident = sum(_resident(job).values()) if job.on_gpu else 0
    return resident + host_context_bytes(job)


def resuming_bytes(job: Job) -> int:
    """What a host holds of a checkpoint while its ranks go on from it; 0: nothing to speak of.

    DeepSpeed reads whole files (`TorchCheckpointEngine.load`), each rank its own: first the
    weights, of stages 0 to 2 all of them, then its part of masters and moments. `engine/single.py`
    and what a small tuning keeps are read tensor by tensor.
    """
    engine = job.engine
    if not isinstance(engine, DeepSpeed) or not job.tuning.whole_model:
        return 0
    stored = stored_parameters(job)
    weights = 0 if _is_sharded(job) else sum(each.num_bytes for each in stored)
    state = sum(each.size for each in trained_parameters(job)) * 12
    each = max(weights, state // job.workers) if engine.stage else weights + state
    return resident_bytes(job) + each * job.local_workers


def pinned(num_bytes: int) -> int:
    """What torch takes of the host for a pinned block."""
    return 1 << max(0, num_bytes - 1).bit_length() if num_bytes else 0


# ------------------------------------------------------------------------- for the whole run


@lru_cache(maxsize=8)
def _resident(job: Job) -> dict[Item, int]:
    """What the ranks of one host hold from the start to the end."""
    engine, found = job.engine, Counter[Item]()
    found[Item.offloaded] += sum(host_moments(job, s.size) for s in trained_parameters(job))
    if isinstance(engine, DeepSpeed) and engine.offload:
        found.update(_offloaded_flat(job) if engine.stage < 3 else _offloaded_shards(job))
    return {item: n * job.local_workers for item, n in found.items() if n}


def _offloaded_flat(job: Job) -> dict[Item, int]:
    """Stages 1 and 2, of one rank: each group's part, pinned."""
    value = job.value_bytes
    total = sum(
        pinned(g.part * 4) * 2 + g.part * 8 + pinned(g.part * value) for g in flat_groups(job)
    )
    largest = max(each.size for each in trained_parameters(job))
    total += pinned(largest * value)
    if job.accumulation > 1:  # `accumulated_grads_in_cpu`: whole gradients of own parameters
        total += sum(pinned(s.size * value) for g in flat_groups(job) for s, _ in g.pieces(0))
    return {Item.offloaded: total}


def _offloaded_shards(job: Job) -> dict[Item, int]:
    """Stage 3, of one rank: masters, moments, gradients in both dtypes; the weights.

    A shard is pinned as it is loaded, then copied to where the optimizer has it flat: torch keeps
    the pinned block that it came in.
    """
    settings = zero_settings(job)
    groups = sub_groups(job, settings.sub_group_size)
    counts = [sum(shard(each.size, job.workers) for each in group) for group in groups]
    state = sum(count * 12 + pinned(count * 4) for count in counts)
    state += pinned(sum(counts) * settings.gradient_bytes)
    weights = pinned(sum(counts) * job.value_bytes)
    for each in stored_parameters(job):
        if each.parameter:
            weights += pinned(_shard_bytes(job, each))
    return {Item.offloaded: state, Item.offloaded_weights: weights}


def _shard_bytes(job: Job, stored: Stored) -> int:
    count = elements(stored, job.value_bytes)
    return shard(count, job.workers) * (stored.num_bytes // count)


# ----------------------------------------------------------------------------- phase by phase


def _loading(job: Job) -> int:
    """Copies in another dtype than the files have; under ZeRO-3 and in NF4 tensor by tensor."""
    stored = stored_parameters(job)
    packed = any(each.item is Item.quantisation for each in stored)
    if _is_sharded(job) or packed:
        return max(each.size for each in stored) * 4 * job.local_workers
    config = job.network.config
    written = _DTYPES.get(str(config.get("dtype") or config.get("torch_dtype")))
    if written == job.value_bytes and job.model.weights is not Weights.random:
        return 0
    whole = sum(each.num_bytes for each in stored if each.item is Item.weights)
    return whole * job.local_workers


def _moved(job: Job) -> int:
    """What a rank moves here from a full GPU for a while; of stage 3 `defragment`'s buffer."""
    from posttrain_dist.planner.memory.phases import device_phases

    moved = max(phase.on_host for phase in device_phases(job))
    if not _is_sharded(job) or zero_settings(job).offload_param:
        return moved
    return max(moved, sum(_shard_bytes(job, each) for each in trained_parameters(job)))


def _is_sharded(job: Job) -> bool:
    return isinstance(job.engine, DeepSpeed) and job.engine.stage == 3


def _kept_inputs(job: Job) -> dict[Item, int]:
    if not job.model.checkpoint_offload:
        return {}
    row = job.row_tokens * job.network.shape.hidden_size * job.value_bytes
    return {Item.checkpoints: job.local_workers * job.recomputed_layers * pinned(row)}


def _saving(job: Job) -> int:
    """The largest tensor of each rank on its way to a file; all of a small tuning on rank 0."""
    stored = stored_parameters(job)
    if not job.tuning.whole_model:
        return kept_as_they_are(job) + sum(each.size * 12 for each in trained_parameters(job))
    engine = job.engine
    if not isinstance(engine, DeepSpeed) or engine.stage == 0:
        writers = job.local_workers if isinstance(engine, DeepSpeed) else 1
        return max(each.size for each in stored) * 4 * writers
    if engine.stage < 3:
        parts = max(group.part * 4 for group in flat_groups(job))
        flat = max(group.numel * job.value_bytes for group in flat_groups(job))
        return max(parts * job.local_workers, flat)
    groups = sub_groups(job, zero_settings(job).sub_group_size)
    largest = max(sum(shard(s.size, job.workers) for s in group) for group in groups)
    return largest * 4 * job.local_workers


def _exporting(job: Job) -> int:
    written = sum(
        each.size * job.value_bytes
        for each in stored_parameters(job)
        if job.tuning.whole_model or each.trained
    )
    largest = max(each.size for each in stored_parameters(job)) * job.value_bytes
    return min(written, _EXPORT_FILE_BYTES + largest)
