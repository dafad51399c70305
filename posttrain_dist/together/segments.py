"""LoRA layers over a row that consists of one segment for each adapter, in their order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from posttrain_dist.tuning.injection.inject import ADAPTER, layers_with


class Segments:
    """Lets the layers of one tree of modules apply the adapters of several, each to its own rows.

    Trees differ in their adapters alone: of a row's k equal segments, segment j is for tree j. What
    is computed from the frozen weight is one product for the whole row.
    """

    def __init__(self) -> None:
        # Of each tree: module name -> layer, and its own forward.
        self._layers: dict[nn.Module, dict[str, tuple[Any, Callable[..., Any]]]] = {}
        self._trees: Sequence[nn.Module] = ()

    def add(self, tree: nn.Module, head: nn.Module) -> None:
        """Take in a tree whose LoRA layers are there; its head sees the rows of its run alone."""
        found = layers_with(tree, "lora_A").items()
        layers = {name: (layer, layer.forward) for name, layer in found if layer is not head}
        self._layers[tree] = layers
        for name, (layer, forward) in layers.items():
            layer.forward = self._segmented(name, forward)

    def remove(self, tree: nn.Module) -> None:
        """Give the tree its own layers back."""
        for layer, forward in self._layers.pop(tree).values():
            layer.forward = forward

    def begin(self, trees: Sequence[nn.Module]) -> None:
        """Let rows consist of a segment for each of these, until `end`.

        The backward of such a row is to come before `end`, for it may compute layers again.
        """
        self._trees = tuple(trees)

    def end(self) -> None:
        """Let every row be one of its own tree again."""
        self._trees = ()

    def _segmented(self, name: str, alone: Callable[..., Any]) -> Callable[..., Any]:
        def forward(row: torch.Tensor, *arguments: Any, **options: Any) -> Any:
            if not self._trees:
                return alone(row, *arguments, **options)
            parts = [self._layers[tree][name] for tree in self._trees]
            segments = row.tensor_split(len(parts), dim=-2)
            if all(_is_plain(layer) for layer, _ in parts):
                changes = [_change(layer, x) for (layer, _), x in zip(parts, segments, strict=True)]
                base = parts[0][0].base_layer(row, *arguments, **options)
                return base + torch.cat(changes, dim=-2)
            rows = [
                own(x, *arguments, **options) for (_, own), x in zip(parts, segments, strict=True)
            ]
            return torch.cat(rows, dim=-2)

        return forward


def _is_plain(layer: Any) -> bool:
    """Whether the layer is W x + scale B A x and no more."""
    variant = getattr(layer, "lora_variant", {})
    no_dropout = isinstance(layer.lora_dropout[ADAPTER], nn.Identity)
    return no_dropout and not variant and isinstance(layer.base_layer, nn.Linear)


def _change(layer: Any, row: torch.Tensor) -> torch.Tensor:
    """scale B A x, as peft computes it."""
    a = layer.lora_A[ADAPTER]
    change: torch.Tensor = layer.lora_B[ADAPTER](a(row.to(a.weight.dtype)))
    scaled: torch.Tensor = change * layer.scaling[ADAPTER]
    return scaled.to(row.dtype)
