"""ZeRO settings that depend on the model's size and on the device; imports no deepspeed.

DeepSpeed's defaults are made for billions of parameters on GPUs: half a gigabyte is reduced at a
time, and every linear layer gathers its own weight. A user's own JSON wins over all that is chosen
here. `benchmarks/deepspeed_overhead.py` measures what it brings on a CPU.
"""

from __future__ import annotations

import os
from collections.abc import MutableMapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

# One gather a decoder layer, up to this size: 100 MB in bfloat16. Small layers are bound by the
# work of the hooks, seven linears and two norms each in forward and backward. The weights of larger
# ones (7B: 17 to 45 million elements each) keep the links busy by themselves, and gathering a layer
# of a 70B model at once would hold 1.7 GB, twice with its prefetch, and gain nothing.
LARGEST_LEAF_ELEMENTS = 50_000_000
# A bucket of gradients on a GPU: 500 MB in bfloat16, two of them when reduction overlaps backward.
# Half of DeepSpeed's default: beyond 100 MB a collective gets no faster.
LARGEST_BUCKET_ELEMENTS = 250_000_000
# On a CPU: 4 MB in float32, which stays in the cache between the copies.
CPU_BUCKET_ELEMENTS = 1_000_000


@dataclass(frozen=True, slots=True)
class Sizes:
    """What of a model the settings depend on; numbers of elements."""

    parameters: int  # that are trained
    layer: int  # of the largest decoder layer
    tensor: int  # of the largest tensor in a decoder layer
    layer_classes: tuple[str, ...] = ()  # of the decoder layers
    embeddings_trained: bool = True

    @staticmethod
    def of(policy: nn.Module, layers: list[Any], embeddings: nn.Module) -> Sizes:
        """Measure `policy`; under ZeRO-3 a parameter's true size is its `ds_numel`."""
        trained = [p for p in policy.parameters() if p.requires_grad]
        return Sizes(
            parameters=sum(map(_numel, trained)),
            layer=max(sum(map(_numel, layer.parameters())) for layer in layers),
            tensor=max(_numel(p) for layer in layers for p in layer.parameters()),
            layer_classes=tuple(sorted({type(layer).__name__ for layer in layers})),
            embeddings_trained=any(p.requires_grad for p in embeddings.parameters()),
        )


def tuned_zero(stage: int, sizes: Sizes, *, world: int, cpu: bool, offload: bool) -> dict[str, Any]:
    """Settings for `zero_optimization` of a run at `stage` on `world` ranks."""
    if stage == 0:
        return {}
    chosen: dict[str, Any] = {"reduce_bucket_size": _bucket(stage, sizes, cpu=cpu)}
    # DeepSpeed reduces the gradients of a leaf when the gradient of its input is there. Behind
    # frozen embeddings the first layer has none: its hook fires too early, and the step fails.
    if stage == 3 and sizes.layer <= LARGEST_LEAF_ELEMENTS and sizes.embeddings_trained:
        chosen["leaf_module"] = {"classes": list(sizes.layer_classes)}
    # On GPUs the reduction of one bucket runs beside the backward that fills the next one. A CPU
    # has no second stream: overlapping would only double the buffers.
    chosen["overlap_comm"] = world > 1 and not cpu
    if not cpu or offload:
        return chosen
    if stage == 3:
        # One all-reduce of the bucket as it is. Reducing and scattering would first copy it into
        # another order, and gloo's own reduce-scatter is an all-reduce too.
        chosen["reduce_scatter"] = False
    else:
        # Gradients are reduced where backward left them or in one small copy, not in a buffer of
        # half a gigabyte that is allocated again in every step.
        chosen["contiguous_gradients"] = False
    return chosen


def loading_zero(stage: int, *, cpu: bool) -> dict[str, Any]:
    """Settings that DeepSpeed needs before the model is there."""
    if stage == 3 and cpu:
        # DeepSpeed replaces torch's linear by a slower one in Python, which keeps no gathered
        # weight for backward: memory that counts on a GPU.
        return {"memory_efficient_linear": False}
    return {}


def set_local_size(environment: MutableMapping[str, str] = os.environ) -> None:
    """Tell DeepSpeed how many CPU devices a node has, as its own launcher does.

    Otherwise its CPU backend starts `numactl --hardware` to count them, at stage 3 for every bucket
    that is reduced and scattered, and every fork makes the memory of the process copy-on-write.
    The number itself is used by quantised gradients only.
    """
    environment.setdefault("LOCAL_SIZE", "1")


def _bucket(stage: int, sizes: Sizes, *, cpu: bool) -> int:
    if not cpu:
        # About 32 reductions a step, so that the last one, which nothing hides, is short.
        return min(LARGEST_BUCKET_ELEMENTS, max(CPU_BUCKET_ELEMENTS, sizes.parameters // 32))
    # A tensor that is larger than the bucket takes the slow way at stage 3, so all of a layer fit.
    return max(CPU_BUCKET_ELEMENTS, sizes.tensor if stage == 3 else 0)


def _numel(parameter: Any) -> int:
    return int(getattr(parameter, "ds_numel", parameter.numel()))
