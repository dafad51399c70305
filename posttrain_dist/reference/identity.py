"""Digests of what a reference is: a run goes on with the same one, and its numbers can be kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import xxhash

from posttrain_dist.config import RunConfig
from posttrain_dist.config.reference_rules import chosen_reference
from posttrain_dist.files import digest_of
from posttrain_dist.models import Weights
from posttrain_dist.models.folder import resolve
from posttrain_dist.objectives.reference_choice import Reference, Referenced
from posttrain_dist.tuning.adapters.adapter_folder import adapter_parts
from posttrain_dist.tuning.adapters.base_digest import base_digest, digest_of_model

_FORMAT = 1  # of the arrays that are kept


def reference_digest(config: RunConfig) -> str:
    """What the reference of a run is, whatever way its log-probabilities are had.

    Raises:
        ModelError: its folder cannot be used.
    """
    objective, tuning = config.objective, config.tuning
    assert isinstance(objective, Referenced)
    if objective.reference_model is not None:
        return base_digest(resolve(objective.reference_model))
    parts: dict[str, Any] = {"base": digest_of_model(config.model)}
    if config.model.weights is Weights.random:
        parts["seed"] = config.seed
    if chosen_reference(config) is not Reference.adapter_off:
        continued = getattr(tuning, "init_from", None)
        if continued is not None:
            parts["adapter"] = _adapter_digests(Path(continued))
        elif not tuning.begins_as_base:
            parts["start"] = [config.seed, config.to_dict()["tuning"]]
        if config.model.add_tokens:
            parts["tokens"] = list(config.model.add_tokens)
    return parts["base"] if len(parts) == 1 else _digest(parts)


def array_key(
    config: RunConfig, reference: str, fingerprint: dict[str, Any], dtype: torch.dtype
) -> str:
    """What its log-probabilities of prepared data depend on, but for rounding.

    Args:
        reference: of `reference_digest`.
        fingerprint: of the prepared data: rows, tokenizer, template, truncation.
    """
    data = {name: value for name, value in fingerprint.items() if name != "versions"}
    quantize = getattr(config.tuning, "quantize", None)
    values = [_FORMAT, reference, data, str(dtype), quantize and quantize.name]
    return _digest(values)


def _adapter_digests(folder: Path) -> list[str]:
    files = [file for part in adapter_parts(folder) for file in sorted(part.glob("adapter*"))]
    return [digest_of(file).xxh3_128 for file in files if file.is_file()]


def _digest(values: Any) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(values, sort_keys=True).encode())
