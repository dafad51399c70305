"""What config.json says of an architecture, against the table of what is trained. No torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from posttrain_dist.errors import ModelError, PosttrainError
from posttrain_dist.models.architectures.config_values import value_faults
from posttrain_dist.models.architectures.known import REFUSED, TRAINED
from posttrain_dist.models.architectures.native_types import native
from posttrain_dist.models.classifier import is_classifier, num_labels
from posttrain_dist.models.quantized import quantisation_fault
from posttrain_dist.models.shape import ModelShape

_EXPERT_KEYS = (
    "num_experts",
    "num_local_experts",
    "n_routed_experts",
    "moe_num_experts",
    "n_experts",
)
_MULTIMODAL_KEYS = ("vision_config", "audio_config", "text_config", "thinker_config")
_DENSE = (
    "use a dense text-only causal LM such as Llama, Qwen3, Mistral or Gemma 2; docs/models.md has "
    "the list of all"
)
_SAVED = "use a folder written by transformers' save_pretrained"


def architecture_problems(config: dict[str, Any], file: Path) -> list[PosttrainError]:
    """Why the model of a config.json cannot be trained; its sizes are read, too.

    Args:
        config: what `file` holds.
    """
    found: list[PosttrainError] = []
    names = config.get("architectures")
    if names is not None and not _are_names(names):
        what = f"architectures is {names!r}, not a list of names"
        return [ModelError(what, where=str(file), fix=_SAVED)]
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        found.append(ModelError("has no model_type", where=str(file), fix=_SAVED))
    fault = _kind_fault(config) or _type_fault(config, model_type) or _name_fault(config)
    what, fix = fault or ("", "")
    if what:
        found.append(ModelError(what, where=str(file), fix=fix))
    if quantised := quantisation_fault(config):
        what, fix = quantised
        found.append(ModelError(what, where=str(file), fix=fix))
    return found or _value_problems(config, file)


def _are_names(found: Any) -> bool:
    return isinstance(found, list) and all(isinstance(name, str) for name in found)


def _kind_fault(config: dict[str, Any]) -> tuple[str, str] | None:
    """(what, fix) of a model that is no dense causal LM of text, whatever its type."""
    architectures = config.get("architectures") or []
    experts = [
        key for key in _EXPERT_KEYS if isinstance(config.get(key), int) and config[key] > 1
    ] or [name for name in architectures if "moe" in name.lower() or "mixtral" in name.lower()]
    nested = [key for key in _MULTIMODAL_KEYS if config.get(key)]
    if experts and config.get("model_type") not in REFUSED:
        return f"is a mixture-of-experts model ({experts[0]}), not supported yet", _DENSE
    if nested:
        return f"is a multimodal model ({nested[0]}), not supported yet", _DENSE
    if config.get("is_encoder_decoder"):
        return "is an encoder-decoder model (is_encoder_decoder), not supported", _DENSE
    if config.get("use_bidirectional_attention") in (True, "all"):
        what = "attends in both directions (use_bidirectional_attention): it is not a causal LM"
        return what, _DENSE
    return None


def _name_fault(config: dict[str, Any]) -> tuple[str, str] | None:
    """(what, fix) of a folder that holds another class of a type that has a causal LM."""
    architectures = config.get("architectures") or []
    if is_classifier(config) and config.get("model_type") in TRAINED:
        labels = num_labels(config)
        fix = "a reward model has one: use the causal LM that it was made of"
        return None if labels == 1 else (f"is a classifier of {labels} labels", fix)
    if architectures and not any("CausalLM" in n or "LMHead" in n for n in architectures):
        return f"is not a causal LM: its architecture is {architectures[0]}", _DENSE
    return None


def _type_fault(config: dict[str, Any], model_type: Any) -> tuple[str, str] | None:
    """(what, fix) of a type that is refused, or that transformers does not have itself."""
    if model_type in REFUSED:
        return f"{model_type} {REFUSED[model_type]}", _DENSE
    if model_type in TRAINED or not isinstance(model_type, str):
        return None
    there = native(model_type)
    if there is None or there.causal_lm:
        return None
    if there.config:
        return f"is not a causal LM: transformers has none of the type {model_type}", _DENSE
    if config.get("auto_map"):
        return (
            f"needs Python code of its own (auto_map), for transformers has no {model_type}; code "
            "that comes with a model is never run",
            "use a model whose type transformers has itself (docs/models.md has the list); many "
            "models also come as such a folder, often converted to Llama",
        )
    what = f"transformers {there.version} has no model type {model_type}"
    return what, f"update transformers, if a newer one has it, or {_DENSE}"


def _value_problems(config: dict[str, Any], file: Path) -> list[PosttrainError]:
    try:
        shape = ModelShape.of(config, str(file))
    except ModelError as error:
        return [error]
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        return [ModelError(f"holds a size that is none: {error}", where=str(file), fix=_SAVED)]
    if shape.model_type not in TRAINED:
        return []
    faults = value_faults(config, shape.head_dim)
    return [ModelError(what, where=str(file), fix=_SAVED) for what in faults]
