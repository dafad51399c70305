"""A Hugging Face folder -> transformers model, inside the engine's own loading context."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from posttrain_dist.errors import ModelError
from posttrain_dist.models import ModelConfig, Weights
from posttrain_dist.models.attention import implementation, register
from posttrain_dist.models.compiled import compile_layers
from posttrain_dist.models.folder import check_folder
from posttrain_dist.models.layers import checkpoint_activations
from posttrain_dist.models.shape import ModelShape
from posttrain_dist.models.varlen import AttentionRequirements


def load_model(
    config: ModelConfig,
    folder: Path,
    *,
    dtype: torch.dtype,
    seed: int,
    materialise: AbstractContextManager[Any],
    attach: Callable[[nn.Module], None] = lambda model: None,
) -> nn.Module:
    """The causal LM of `folder` for packed training.

    Args:
        materialise: the engine's context: under ZeRO-3 every rank keeps its shard only.
        dtype: of the weights.
        seed: for `weights=random`, where no file is read.
        attach: of the tuning: freezes and inserts, in the same context.

    Raises:
        ModelError: the folder cannot be used, or weights are missing from it.
        ConfigError: model.checkpoint_layers or model.compile cannot be had.
    """
    import transformers

    fresh = config.weights is Weights.random
    check_folder(folder, need_weights=not fresh)
    register()
    hf_config = transformers.AutoConfig.from_pretrained(
        folder, local_files_only=True, trust_remote_code=False
    )
    shape = ModelShape.of(hf_config.to_dict(), str(folder / "config.json"))
    attention = implementation(config.attention, AttentionRequirements.of(shape, dtype))
    with materialise:
        if fresh:
            torch.manual_seed(seed)
            model = transformers.AutoModelForCausalLM.from_config(
                hf_config, dtype=dtype, attn_implementation=attention, trust_remote_code=False
            )
        else:
            model, report = transformers.AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=dtype,
                attn_implementation=attention,
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                output_loading_info=True,
            )
            _refuse_incomplete(report, folder)
        attach(model)
    model.config.use_cache = False
    checkpoint_activations(model, config)
    if config.compile:
        compile_layers(model)
    return model  # type: ignore[no-any-return]


def _refuse_incomplete(report: dict[str, Any], folder: Path) -> None:
    missing = sorted(report.get("missing_keys", ()))
    if missing:
        others = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ModelError(
            f"weights are not in the files: {missing[0]}{others}",
            where=str(folder),
            fix="copy the whole model folder again, or use model.weights=random to start afresh",
        )
    errors = list(report.get("error_msgs", ())) + sorted(report.get("mismatched_keys", ()))
    if errors:
        raise ModelError(
            f"weights do not fit the model: {errors[0]}",
            where=str(folder),
            fix="config.json and the safetensors are of different models",
        )
