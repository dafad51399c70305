"""The last decoder layer: what leaves it are the supervised rows only.

Behind it stand the final norm and the head, which then meet N rows instead of T. The rows travel
as the keyword `supervised_N` through the backbone; without it the model is as it was.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from posttrain_dist.errors import ModelError


def shorten(backbone: nn.Module) -> None:
    """Make `backbone(..., supervised_N=rows)` return the last hidden states of these rows only.

    Raises:
        ModelError: the backbone has no decoder layer that is known as one.
    """
    layers = decoder_layers(backbone)
    layers[-1].register_forward_hook(_select, with_kwargs=True)


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


def _select(layer: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
    """The rows `supervised_N` of the layer's output [1, T, D]; padding may repeat a row."""
    rows_N: torch.Tensor | None = kwargs.get("supervised_N")
    if rows_N is None:
        return output
    if isinstance(output, tuple):
        return (output[0].index_select(1, rows_N), *output[1:])
    return output.index_select(1, rows_N)
