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
from posttrain_dist.models.architectures.failures import named_failures
from posttrain_dist.models.attention import implementation, register
from posttrain_dist.models.compiled import compile_layers
from posttrain_dist.models.embeddings.added_tokens import add_rows, refuse_untrained
from posttrain_dist.models.folder import check_folder, read_added_ids
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
        seed: of what is inserted, and for `weights=random`, where no file is read.
        attach: of the tuning: freezes and inserts, in the same context.

    Raises:
        ModelError: the folder cannot be used, or weights are missing from it.
        ConfigError: model.checkpoint_layers, model.compile or model.add_tokens cannot be had.
    """
    fresh = config.weights is Weights.random
    found = check_folder(folder, need_weights=not fresh)
    register()
    name = str((found.get("architectures") or [found["model_type"]])[0])
    with materialise:
        with named_failures(name, "loaded"):
            model: Any = _build(config, folder, dtype, seed if fresh else None)
        add_rows(model, read_added_ids(folder, config.add_tokens))
        with torch.random.fork_rng(devices=[]):  # what is inserted depends on the seed alone
            torch.manual_seed(seed)
            attach(model)
        refuse_untrained(model)
    model.config.use_cache = False
    checkpoint_activations(model, config)
    if config.compile:
        compile_layers(model)
    return model  # type: ignore[no-any-return]


def _build(config: ModelConfig, folder: Path, dtype: torch.dtype, seed: int | None) -> nn.Module:
    """The model with the attention of `config`; its weights from files, or fresh of a `seed`."""
    import transformers

    hf_config = transformers.AutoConfig.from_pretrained(
        folder, local_files_only=True, trust_remote_code=False
    )
    shape = ModelShape.of(hf_config.to_dict(), str(folder / "config.json"))
    options: dict[str, Any] = {
        "dtype": dtype,
        "attn_implementation": implementation(
            config.attention, AttentionRequirements.of(shape, dtype)
        ),
        "trust_remote_code": False,
    }
    auto = transformers.AutoModelForCausalLM
    if seed is not None:
        torch.manual_seed(seed)
        return auto.from_config(hf_config, **options)  # type: ignore[no-any-return]
    model, report = auto.from_pretrained(
        folder, **options, local_files_only=True, use_safetensors=True, output_loading_info=True
    )
    _refuse_incomplete(report, folder)
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
