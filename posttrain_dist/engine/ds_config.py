"""The DeepSpeed configuration of a run; imports no deepspeed, so that it can be checked early."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from posttrain_dist.engine import DeepSpeed
from posttrain_dist.errors import ConfigError

# What a run decides itself: a user's JSON may not say it again, not even the same.
OWNED = {
    "train_batch_size": "train.batch_size",
    "train_micro_batch_size_per_gpu": "train.micro_batch_size",
    "gradient_accumulation_steps": "train.micro_batch_size (accumulation follows from it)",
    "gradient_clipping": "optimizer.clip",
    "optimizer": "optimizer",
    "scheduler": "optimizer.schedule",
    "bf16": "train.dtype",
    "fp16": "train.dtype",
    "zero_optimization.stage": "engine.stage",
    "zero_optimization.offload_optimizer": "engine.offload",
    "zero_optimization.offload_param": "engine.offload",
    "zero_optimization.stage3_param_persistence_threshold": "engine.persistence_threshold",
    "zero_allow_untested_optimizer": "optimizer",
    "zero_force_ds_cpu_optimizer": "engine.offload",
    "gradient_allreduce_op": "engine",
    "zero_optimization.compute_grad_norm": "nothing: each step needs the norm",
    "prescale_gradients": "engine",
    "gradient_predivide_factor": "engine",
}


def deepspeed_config(engine: DeepSpeed, *, clip: float, bf16: bool) -> dict[str, Any]:
    """The dictionary for `deepspeed.initialize`.

    The loop owns accumulation and normalisation: one micro-batch, no accumulation here.

    Raises:
        ConfigError: the user's JSON cannot be read, or sets what the run itself sets.
    """
    zero: dict[str, Any] = {"stage": engine.stage}
    if engine.stage == 3:
        zero["stage3_param_persistence_threshold"] = engine.persistence_threshold
        zero["stage3_gather_16bit_weights_on_model_save"] = False
    if engine.offload:
        zero["offload_optimizer"] = {"device": "cpu"}
        if engine.stage == 3:
            zero["offload_param"] = {"device": "cpu"}
    ours: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        # At stage 0 in float32 DeepSpeed tells no norm: our engine clips, and has it.
        "gradient_clipping": clip if engine.stage or bf16 else 0.0,
        "bf16": {"enabled": bf16},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 1_000_000_000,
    }
    if engine.config is None:
        return ours
    return _merge(_read_json(Path(engine.config)), ours, engine.config)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        theirs = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"cannot be read: {error}", where=str(path), fix="give a DeepSpeed JSON file"
        ) from error
    if not isinstance(theirs, dict):
        raise ConfigError("is not a JSON object", where=str(path), fix="give a DeepSpeed JSON file")
    return theirs


def _merge(theirs: dict[str, Any], ours: dict[str, Any], path: str) -> dict[str, Any]:
    their_zero = theirs.get("zero_optimization", {})
    if not isinstance(their_zero, dict):
        raise ConfigError(
            "zero_optimization is not a JSON object",
            where=path,
            fix='write it as {"zero_optimization": {"reduce_bucket_size": 50000000}}',
        )
    said = [*theirs, *(f"zero_optimization.{key}" for key in their_zero)]
    set_by_us = {*ours, *(f"zero_optimization.{key}" for key in ours["zero_optimization"])}
    set_by_us -= {"zero_optimization"}
    conflicts = [
        f"{key} (set {OWNED[key]})" if key in OWNED else f"{key} (the run sets it)"
        for key in said
        if key in OWNED or key in set_by_us
    ]
    if conflicts:
        raise ConfigError(
            f"sets what the run itself sets: {'; '.join(conflicts)}",
            where=path,
            fix="remove these keys from the file and use the run's own",
        )
    return {**theirs, **ours, "zero_optimization": {**their_zero, **ours["zero_optimization"]}}
