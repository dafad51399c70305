"""Layers that keep the bounds of samples from their attention, made to hand them on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from posttrain_dist.models.attention import ROW_KEYWORDS
from posttrain_dist.models.layers import decoder_layers


def hand_row_to_attention(backbone: nn.Module) -> None:
    """Let every decoder layer give the keywords of the packed row to its `self_attn`.

    Raises:
        ModelError: the backbone has no decoder layer.
    """
    for layer in decoder_layers(backbone):
        base = type(layer)
        # A subclass, so that activation checkpointing runs it again: see models/last_layer.py.
        layer.__class__ = type(f"RowHanding{base.__name__}", (base,), {"forward": _forward(base)})


def _forward(base: Any) -> Callable[..., Any]:
    def forward(self: Any, *args: Any, **options: Any) -> Any:
        row = {name: options[name] for name in ROW_KEYWORDS if name in options}
        hook = self.self_attn.register_forward_pre_hook(
            lambda _, args, kwargs: (args, kwargs | row), with_kwargs=True
        )
        with hook:
            return base.forward(self, *args, **options)

    return forward
