"""The module of a bottleneck adapter, and how a sublayer of a decoder layer gets one.

The sublayer keeps its name and its parameters theirs: it becomes an object of a subclass whose
forward adds what the adapter gives, and the adapter is a child that is called, so that its hooks
fire under ZeRO-3. A sublayer works row by row or hands on all rows, so what the last layer does
with the rows of its MLP (models/last_layer.py) is done to the adapter as well.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

NAME = "bottleneck"  # of the child in the sublayer


class BottleneckLayer(nn.Module):
    """scale · up(f(down(x))): D to W to D, rows of any number; 0 at the start, `up` being 0.

    Args:
        nonlinearity: f, a function of `torch.nn.functional`: "relu".
    """

    def __init__(
        self,
        hidden_size: int,
        width: int,
        nonlinearity: str,
        scale: float,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__()
        options: dict[str, Any] = {"dtype": dtype, "device": device}
        self.down = nn.Linear(hidden_size, width, **options)  # Kaiming uniform, a = sqrt(5)
        self.up = nn.Linear(width, hidden_size, **options)
        self.off = False  # whether the sublayer leaves it out
        self.scale, self._nonlinearity = scale, getattr(nn.functional, nonlinearity)
        for zero in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(zero)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """What is added to the output of the sublayer; shape and dtype of `hidden` [..., D]."""
        added: torch.Tensor = self.up(self._nonlinearity(self.down(hidden)))
        return added * self.scale


def add_bottleneck(sublayer: nn.Module, adapter: nn.Module, *, parallel: bool) -> None:
    """Make `sublayer` add its adapter to what it gives, or first in the tuple that it gives.

    Args:
        parallel: the adapter reads the input of the sublayer, else its output.
    """
    base: Any = type(sublayer)

    def forward(self: Any, *args: Any, **options: Any) -> Any:
        output = base.forward(self, *args, **options)
        if self.bottleneck.off:
            return output
        first = output[0] if isinstance(output, tuple) else output
        first = first + self.bottleneck(args[0] if parallel else first)
        return (first, *output[1:]) if isinstance(output, tuple) else first

    sublayer.add_module(NAME, adapter)
    # A subclass, as in models/last_layer.py; isinstance holds for it.
    sublayer.__class__ = type(f"Adapted{base.__name__}", (base,), {"forward": forward})
