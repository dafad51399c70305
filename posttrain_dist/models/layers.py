"""The decoder layers of a model, and which of them recompute their activations."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from posttrain_dist.errors import ConfigError, ModelError
from posttrain_dist.models import Checkpointing, ModelConfig


def decoder_layers(backbone: nn.Module) -> list[Any]:
    """The layers of a transformers backbone, first to last.

    Raises:
        ModelError: there is none.
    """
    layers = [m for m in backbone.modules() if isinstance(m, GradientCheckpointingLayer)]
    if not layers:
        raise ModelError(
            f"{type(backbone).__name__} has no decoder layers in the form of transformers",
            where="model.path",
            fix="this architecture is not supported yet",
        )
    return layers


def checkpoint_activations(model: nn.Module, config: ModelConfig) -> None:
    """Let layers keep their input only and run again in backward (Chen et al., arXiv:1604.06174).

    `selective` takes the first layers. Backward meets them last, when the activations of the other
    layers are already gone, so that the peak is theirs alone, L - k layers; were the last ones
    taken, it would be one layer higher, by the first layer that runs again. And the last layer is
    the cheapest to keep: its MLP holds the supervised rows only.

    Raises:
        ConfigError: checkpoint_layers without `selective`, or more of them than there are layers.
    """
    layers = decoder_layers(model)
    for i, layer in enumerate(layers):
        layer.gradient_checkpointing = i < _num_recomputed(config, len(layers))
        layer._gradient_checkpointing_func = _offloaded if config.checkpoint_offload else _kept


_kept = partial(checkpoint, use_reentrant=False)


def _offloaded(layer: Callable[..., Any], *inputs: Any) -> Any:
    """A checkpoint whose inputs are copied to host memory, and back when backward needs them."""
    with torch.autograd.graph.save_on_cpu(pin_memory=torch.cuda.is_available()):
        return _kept(layer, *inputs)


def _num_recomputed(config: ModelConfig, num_layers: int) -> int:
    choice, number = config.activation_checkpointing, config.checkpoint_layers
    where = "model.checkpoint_layers"
    if choice is not Checkpointing.selective:
        if number is not None:
            raise ConfigError(
                f"is {number}, but model.activation_checkpointing is {choice.name}",
                where=where,
                fix="set model.activation_checkpointing=selective",
            )
        return num_layers if choice is Checkpointing.full else 0
    if number is None or not 0 < number <= num_layers:
        raise ConfigError(
            f"is {number}, and the model has {num_layers} layers",
            where=where,
            fix=f"set how many layers recompute, 1 to {num_layers}",
        )
    return number
