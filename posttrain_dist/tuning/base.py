"""Which parameters are trained, and what is inserted for it: the slot, and what Policy asks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import nn

    from posttrain_dist.flow import Batch


@dataclass(kw_only=True, slots=True)
class Tuning:
    """The slot `tuning`: a dataclass whose fields are its knobs. Here every parameter is trained.

    Parameters are named as in the causal LM.
    """

    @property
    def unmergeable(self) -> str:
        """Why what is trained cannot become part of the model's own weights; empty if it can."""
        return ""

    @property
    def mergeable(self) -> bool:
        """Whether what is trained can become part of the model's own weights."""
        return not self.unmergeable

    def trained(self, name: str) -> bool:
        """Whether the parameter `name` is trained. Checkpoints hold the frozen ones too."""
        return True

    def exported(self, name: str) -> bool:
        """Whether the parameter `name` is part of an export.

        Of a mergeable tuning that is the whole model; of another one what was trained beside it.
        """
        return self.mergeable or self.trained(name)

    def attach(self, model: nn.Module) -> None:
        """Insert modules, if any, and freeze what is not trained.

        Called once, inside the engine's `materialise()`. What is inserted must be a module that
        is called, so that its hooks fire under ZeRO-3.
        """
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(self.trained(name))

    def extend(self, batch: Batch) -> Batch:
        """The row that the model runs on: with virtual tokens, if there are any.

        `supervised_N` still names the rows that predict `labels_N`; see `tuning/virtual.py`.
        """
        return batch

    def embed(self, model: nn.Module, batch: Batch) -> torch.Tensor | None:
        """Embeddings [T, D] of an extended row; None: the model's own, of `input_ids_T`."""
        return None
