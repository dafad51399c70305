"""The modules of a model, without weights: what targets are looked up in before any load."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from posttrain_dist.models.architectures.known import TRAINED
from posttrain_dist.models.classifier import is_classifier

if TYPE_CHECKING:
    from torch import nn

_SIZES = ("_size", "_dim", "_rank")


def surely_fits(network: Mapping[str, Any], rank: int = 1) -> bool:
    """Whether a known architecture has no size below the rank, so that no look is needed.

    A look costs the import of transformers, five seconds in the command that is typed.
    """
    sizes = [
        value
        for key, value in network.items()
        if key.endswith(_SIZES) and isinstance(value, int) and value > 0
    ]
    return network.get("model_type") in TRAINED and bool(sizes) and rank <= min(sizes)


def empty_model(network: Mapping[str, Any]) -> nn.Module | None:
    """The model of a config.json on the meta device; None: transformers does not know it."""
    import torch
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    name = str(network.get("model_type"))
    if name not in CONFIG_MAPPING:
        return None
    plain = {key: value for key, value in network.items() if key != "quantization_config"}
    config = CONFIG_MAPPING[name].from_dict(plain)
    auto = transformers.AutoModelForCausalLM
    if is_classifier(network):
        auto = transformers.AutoModelForSequenceClassification
    if type(config) not in auto._model_mapping:
        return None
    with torch.device("meta"):
        model: nn.Module = auto.from_config(config, attn_implementation="eager")
    return model
