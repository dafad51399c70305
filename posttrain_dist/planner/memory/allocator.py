"""What a GPU holds beyond what is allocated: the allocator's slack, the CUDA context, NCCL.

Stated figures, each with where it comes from; a CPU has none of them.

    slack      torch's caching allocator cuts segments of 2 MiB (below 1 MiB), of 20 MiB (below
               10 MiB) and of multiples of 2 MiB (`c10/cuda/CUDACachingAllocator`): what lies free
               between blocks that are alive is lost. What stays for the whole run lies close; what
               comes and goes in every step leaves holes, more of them under ZeRO-3, whose gathered
               weights of many sizes are freed by another stream
    context    the driver's own memory of a process, and the kernels that CUDA loads into it
    NCCL       buffers of each channel: NVIDIA/nccl #964 saw 544 MB for two A100 and 688 MB for
               more with NVLink, #1685 1.06 GB with the context on 8 H100
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from posttrain_dist.engine import DeepSpeed
from posttrain_dist.planner.job import Job
from posttrain_dist.planner.plan import Item, Phase

MIB = 1 << 20
# Of what comes and goes in a step, and of what stays.
_SHARE_OF_CHANGING, _SHARE_OF_STAYING = 0.04, 0.002
_SHARE_UNDER_ZERO3 = 0.1
_SEGMENT_BYTES = 20 * MIB
_CONTEXT_BYTES = {"b200": 700 * MIB, "gh200": 600 * MIB, "h": 560 * MIB, "a": 440 * MIB}
_OTHER_CONTEXT_BYTES = 360 * MIB
_NCCL_PAIR_BYTES, _NCCL_NODE_BYTES, _NCCL_NODES_BYTES = 330 * MIB, 500 * MIB, 900 * MIB
_STAYING = {
    Item.weights,
    Item.reference_model,
    Item.quantisation,
    Item.adapter,
    Item.virtual_tokens,
    Item.master,
    Item.moments,
}


def slack_bytes(job: Job, phases: Sequence[Phase]) -> int:
    """Held by torch's allocator at the peak beyond what is allocated then."""
    if not job.on_gpu or not phases:
        return 0
    items = max(phases, key=lambda phase: phase.allocated_bytes).items
    staying = sum(size for item, size in items.items() if item in _STAYING)
    changing = sum(items.values()) - staying
    sharded = isinstance(job.engine, DeepSpeed) and job.engine.stage == 3
    share = _SHARE_UNDER_ZERO3 if sharded else _SHARE_OF_CHANGING
    return round(_SEGMENT_BYTES + share * changing + _SHARE_OF_STAYING * staying)


def room_bytes(job: Job) -> int | None:
    """Of a GPU, what there is to be allocated: without its margin, context, and the least slack."""
    machine = job.machine
    if not job.on_gpu:
        return None
    free = machine.gpu_memory_bytes - math.ceil(machine.gpu_memory_bytes * machine.margin)
    return round((free - context_bytes(job) - _SEGMENT_BYTES) / (1 + _SHARE_OF_STAYING))


def context_bytes(job: Job) -> int:
    """Of CUDA, and of NCCL's communicator where there are several ranks."""
    gpu = job.machine.gpu
    if gpu is None:
        return 0
    names = (gpu, gpu[:1]) if gpu.startswith(("h1", "h2", "h8", "a1", "a8")) else (gpu,)
    known = [_CONTEXT_BYTES[name] for name in names if name in _CONTEXT_BYTES]
    context = known[0] if known else _OTHER_CONTEXT_BYTES
    if not isinstance(job.engine, DeepSpeed) or job.workers == 1:
        return context
    if job.workers > job.local_workers:
        return context + _NCCL_NODES_BYTES
    return context + (_NCCL_PAIR_BYTES if job.workers == 2 else _NCCL_NODE_BYTES)
