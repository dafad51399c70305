"""The settings that DeepSpeed runs with: those of `engine/`, a user's JSON, its own defaults."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from posttrain_dist.engine import DeepSpeed
from posttrain_dist.engine.ds_config import deepspeed_config
from posttrain_dist.engine.ds_tuning import Sizes, loading_zero, tuned_zero
from posttrain_dist.planner.job import Job, shared_by
from posttrain_dist.planner.memory.parameters import (
    Stored,
    stored_parameters,
    trained_parameters,
)

# deepspeed 0.19.8, runtime/zero/config.py
_DEFAULTS: dict[str, Any] = {
    "contiguous_gradients": True,
    "reduce_scatter": True,
    "reduce_bucket_size": 500_000_000,
    "sub_group_size": 1_000_000_000,
    "stage3_prefetch_bucket_size": 50_000_000,
    "stage3_max_live_parameters": 1_000_000_000,
    "stage3_max_reuse_distance": 1_000_000_000,
    "stage3_param_persistence_threshold": 100_000,
    "memory_efficient_linear": True,
}
_PREFIX = "stage3_"


@dataclass(frozen=True, slots=True, kw_only=True)
class ZeroSettings:
    """As `zero_optimization` names them; sizes in elements.

    Attributes:
        leaf: a decoder layer is gathered, and its gradients are reduced, as one.
        efficient_linear: DeepSpeed's linear, which keeps no gathered weight for backward.
        offload_optimizer, offload_param: to the host; of a rank on a CPU nothing goes anywhere.
        gradient_bytes: of an element of the gradients that are kept.
    """

    stage: int
    contiguous_gradients: bool
    overlap_comm: bool
    reduce_scatter: bool
    reduce_bucket_size: int
    sub_group_size: int
    prefetch_bucket_size: int
    max_live_parameters: int
    max_reuse_distance: int
    param_persistence_threshold: int
    efficient_linear: bool
    leaf: bool
    offload_optimizer: bool
    offload_param: bool
    gradient_bytes: int


@lru_cache(maxsize=8)
def zero_settings(job: Job) -> ZeroSettings:
    """What `engine/deepspeed.py` hands to `deepspeed.initialize` for this job.

    Raises:
        ConfigError: the user's JSON cannot be read, or sets what the run itself sets.
    """
    engine = job.engine
    assert isinstance(engine, DeepSpeed)
    bf16 = job.value_bytes == 2
    given = deepspeed_config(engine, clip=job.optimizer.clip, bf16=bf16)
    values = {
        **_DEFAULTS,
        **tuned_zero(
            engine.stage,
            _sizes(job),
            world=job.workers,
            cpu=not job.on_gpu,
            offload=engine.offload,
        ),
        **loading_zero(engine.stage, cpu=not job.on_gpu),
        **given["zero_optimization"],
    }
    plain = {name.removeprefix(_PREFIX): value for name, value in values.items()}
    overlap = plain.get("overlap_comm")
    accumulation = given.get("data_types", {}).get("grad_accum_dtype")
    return ZeroSettings(
        stage=engine.stage,
        contiguous_gradients=plain["contiguous_gradients"] or engine.offload,
        overlap_comm=engine.stage == 3 if overlap is None else overlap,
        reduce_scatter=plain["reduce_scatter"],
        reduce_bucket_size=int(plain["reduce_bucket_size"]),
        sub_group_size=int(plain["sub_group_size"]),
        prefetch_bucket_size=int(plain["prefetch_bucket_size"]),
        max_live_parameters=int(plain["max_live_parameters"]),
        max_reuse_distance=int(plain["max_reuse_distance"]),
        param_persistence_threshold=int(plain["param_persistence_threshold"]),
        efficient_linear=plain["memory_efficient_linear"],
        leaf="leaf_module" in plain,
        offload_optimizer=engine.offload and job.on_gpu,
        offload_param=engine.offload and job.on_gpu and engine.stage == 3,
        gradient_bytes=4 if accumulation == "fp32" else job.value_bytes,
    )


def elements(stored: Stored, value_bytes: int) -> int:
    """Elements that torch counts: of a packed weight its bytes."""
    return stored.size if stored.num_bytes == stored.size * value_bytes else stored.num_bytes


@shared_by("parameters_key")
def _sizes(job: Job) -> Sizes:
    """As `Sizes.of` measures the policy."""
    layers: dict[str, int] = {}
    tensor, embeddings_trained = 0, False
    before = {one.name for one in job.network.before}
    for each in stored_parameters(job):
        if not each.parameter:
            continue
        embeddings_trained = embeddings_trained or (each.trained and each.name in before)
        layer = layer_of(job, each.name)
        if layer is not None:
            count = elements(each, job.value_bytes)
            layers[layer] = layers.get(layer, 0) + count
            tensor = max(tensor, count)
    return Sizes(
        parameters=sum(each.size for each in trained_parameters(job)),
        layer=max(layers.values()),
        tensor=tensor,
        layer_classes=("layer",),
        embeddings_trained=embeddings_trained,
    )


def layer_of(job: Job, name: str) -> str | None:
    """Number of the decoder layer that a parameter is of, as text; None: outside of them."""
    start = job.network.layers_name + "."
    return name[len(start) :].partition(".")[0] if name.startswith(start) else None
