"""A Hugging Face folder -> transformers model, inside the engine's own loading context.

A reward model is loaded of either folder: of a causal LM, whose lm_head is left out and whose new
head is drawn, or of one that was made before.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from posttrain_dist.errors import ModelError
from posttrain_dist.models import ModelConfig, Weights
from posttrain_dist.models.architectures.failures import named_failures
from posttrain_dist.models.attention import implementation, register
from posttrain_dist.models.classifier import SCORE, check_kind, is_classifier
from posttrain_dist.models.classifier.scalar_head import draw_head, refuse_frozen_head
from posttrain_dist.models.compiled import compile_layers
from posttrain_dist.models.embeddings.added_tokens import add_rows, refuse_untrained
from posttrain_dist.models.finite import refuse_extremes
from posttrain_dist.models.folder import check_folder, read_added_ids
from posttrain_dist.models.layers import checkpoint_activations
from posttrain_dist.models.quantized import holds_nf4
from posttrain_dist.models.quantized.load_nf4 import (
    nf4_options,
    prepare_linears,
    quantising,
    refuse_trained,
    refuse_unquantisable,
)
from posttrain_dist.models.shape import ModelShape
from posttrain_dist.models.varlen import AttentionRequirements

_log = logging.getLogger(__name__)


def load_model(
    config: ModelConfig,
    folder: Path,
    *,
    dtype: torch.dtype,
    seed: int,
    materialise: AbstractContextManager[Any],
    attach: Callable[[nn.Module], None] = lambda model: None,
    nf4: bool = False,
    device: torch.device | None = None,
    base: nn.Module | None = None,
    scalar: bool = False,
) -> nn.Module:
    """The causal LM of `folder` for packed training.

    Args:
        materialise: the engine's context: under ZeRO-3 every rank keeps its shard only.
        dtype: of the weights.
        seed: of what is inserted, and for `weights=random`, where no file is read.
        attach: of the tuning: freezes and inserts, in the same context.
        nf4: store the layers' weights in 4 bits, as those of a folder that holds them so.
        device: where a base in NF4 is made, tensor by tensor; others come to the host first.
        base: what `load_base` gave, in place of the files; it is tuned, and so of no more use.
        scalar: a reward model: its backbone with a scalar head.

    Raises:
        ModelError: the folder cannot be used, or weights are missing from it.
        ConfigError: model.checkpoint_layers, model.compile or model.add_tokens cannot be had.
    """
    with materialise:
        model: Any = base
        if base is None:
            model = load_base(
                config, folder, dtype=dtype, seed=seed, nf4=nf4, device=device, scalar=scalar
            )
        add_rows(model, read_added_ids(folder, config.add_tokens))
        with torch.random.fork_rng(devices=[]):  # what is inserted depends on the seed alone
            torch.manual_seed(seed)
            attach(model)
    refuse_trained(model, folder)
    refuse_untrained(model)
    if scalar:
        refuse_frozen_head(model)
    model.config.use_cache = False
    checkpoint_activations(model, config)
    if config.compile:
        compile_layers(model)
    return model  # type: ignore[no-any-return]


def load_base(
    config: ModelConfig,
    folder: Path,
    *,
    dtype: torch.dtype,
    seed: int,
    nf4: bool = False,
    device: torch.device | None = None,
    scalar: bool = False,
) -> nn.Module:
    """The model as its files have it, before it is tuned; see `load_model`.

    Raises:
        ModelError: the folder cannot be used, or weights are missing from it.
    """
    fresh = config.weights is Weights.random
    found = check_folder(folder, need_weights=not fresh)
    check_kind(found, folder, scalar=scalar)
    register()
    name = str((found.get("architectures") or [found["model_type"]])[0])
    kind = _Kind(scalar, new_head=scalar and not is_classifier(found))
    model: Any
    with named_failures(name, "loaded"):
        if nf4 or holds_nf4(found):
            assert not fresh, "check_base and the rules of the config refuse it"
            model = _build_nf4(config, folder, dtype, device or torch.device("cpu"), kind)
        else:
            model = _build(config, folder, dtype, seed if fresh else None, kind)
        if kind.new_head or (scalar and fresh):
            draw_head(model, seed)
    if scalar:  # its own forward then reads the last token, whatever it is
        model.config.pad_token_id = None
    return model  # type: ignore[no-any-return]


@dataclass(frozen=True, slots=True)
class _Kind:
    """Which class of transformers is loaded."""

    scalar: bool  # a reward model
    new_head: bool  # ... whose head is in no file

    @property
    def auto(self) -> Any:
        import transformers

        if self.scalar:
            return transformers.AutoModelForSequenceClassification
        return transformers.AutoModelForCausalLM

    @property
    def options(self) -> dict[str, Any]:
        return {"num_labels": 1} if self.scalar else {}


def _build(
    config: ModelConfig, folder: Path, dtype: torch.dtype, seed: int | None, kind: _Kind
) -> nn.Module:
    """The model with the attention of `config`; its weights from files, or fresh of a `seed`."""
    hf_config = read_config(folder, **kind.options)
    options = _options(config, hf_config, folder, dtype)
    if seed is None:
        return _read_weights(folder, options, kind)
    torch.manual_seed(seed)
    return kind.auto.from_config(hf_config, **options)  # type: ignore[no-any-return]


def _build_nf4(
    config: ModelConfig, folder: Path, dtype: torch.dtype, device: torch.device, kind: _Kind
) -> nn.Module:
    """The model with its layers' weights in NF4 on `device`, from 16-bit files or as stored."""
    hf_config = read_config(folder)
    stored = holds_nf4(hf_config.to_dict())
    refuse_unquantisable(hf_config, folder, device)
    options = _options(config, hf_config, folder, dtype)
    with quantising() as extremes:
        model = _read_weights(folder, options | nf4_options(dtype, device, stored=stored), kind)
    refuse_extremes(extremes, folder, num_tensors=len(list(model.parameters())))
    prepare_linears(model, dtype, folder)
    held_gb = sum(p.nbytes for p in model.parameters()) / 1e9
    _log.info("the base is in NF4: %.2f GB on this rank, before anything is sharded", held_gb)
    return model


def read_config(folder: Path, **changes: Any) -> Any:
    """The transformers config of a folder, whose code is never run."""
    import transformers

    return transformers.AutoConfig.from_pretrained(
        folder, local_files_only=True, trust_remote_code=False, **changes
    )


def _options(
    config: ModelConfig, hf_config: Any, folder: Path, dtype: torch.dtype
) -> dict[str, Any]:
    shape = ModelShape.of(hf_config.to_dict(), str(folder / "config.json"))
    attention = implementation(config.attention, AttentionRequirements.of(shape, dtype))
    return {"dtype": dtype, "attn_implementation": attention, "trust_remote_code": False}


def _read_weights(folder: Path, options: dict[str, Any], kind: _Kind) -> nn.Module:
    options = {**options, **kind.options, "local_files_only": True, "use_safetensors": True}
    with _quiet(kind):
        model, report = kind.auto.from_pretrained(folder, **options, output_loading_info=True)
    if kind.new_head:
        report = {**report, "missing_keys": set(report["missing_keys"]) - {f"{SCORE}.weight"}}
    _refuse_incomplete(report, folder)
    return model  # type: ignore[no-any-return]


@contextmanager
def _quiet(kind: _Kind) -> Iterator[None]:
    """Without transformers' table of tensors: that a new head is in no file is meant."""
    from transformers.utils import logging as hf_logging

    before = hf_logging.get_verbosity()
    if kind.new_head:
        hf_logging.set_verbosity_error()
    try:
        yield
    finally:
        hf_logging.set_verbosity(before)


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
