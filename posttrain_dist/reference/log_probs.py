"""Log-probabilities of the supervised tokens of a batch, by a model that is run without gradients.

They are an objective of their own, so that they go through the forward of an engine, whose hooks
bring the weights under ZeRO-3, and through the operation and the row that the policy's own loss
goes through: two equal models give equal numbers, to the last bit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from posttrain_dist.flow import Batch, Loss
from posttrain_dist.models.head import Head
from posttrain_dist.objectives.base import Objective

# A batch -> log p of each of its supervised tokens; float32 [N], 0 in padding.
Score = Callable[[Batch], torch.Tensor]


@dataclass(kw_only=True, slots=True)
class LogProbs(Objective):
    """Gives the negative log-probability of each supervised token, and no loss."""

    def loss(self, hidden_ND: torch.Tensor, head: Head, batch: Batch, denominators: Any) -> Loss:
        """`nll_N`; total and columns are empty."""
        found_N = head.logprob(hidden_ND, batch.labels_N).logprob_N
        nothing = found_N.new_zeros(())
        return Loss(total=nothing, channels_CK=found_N.new_zeros((0, 0)), nll_N=-found_N)


_OBJECTIVE = LogProbs()


@torch.no_grad()
def log_probs(forward: Callable[[Batch, Any, Any], Loss], batch: Batch) -> torch.Tensor:
    """log p of each supervised token, float32 [N], 0 in padding.

    Args:
        forward: of an engine or a policy, which is in evaluation mode.
    """
    loss = forward(batch, _OBJECTIVE, None)
    assert loss.nll_N is not None
    return torch.where(batch.weight_N != 0, -loss.nll_N, 0.0).float()
