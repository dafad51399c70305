"""What an objective is, and the token loss that SFT and pretraining share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    import torch

    from posttrain_dist.flow import Batch, Loss


@dataclass(kw_only=True, slots=True)
class Objective:
    """The slot `objective`: a dataclass whose fields are its knobs.

    `count` gives the share of a micro-batch in the step's denominator; `loss` the already
    normalised loss. `rows` names what data it reads: "messages" or "text".
    """

    rows: ClassVar[str] = "messages"

    def count(self, batch: Batch) -> float:
        """Weight of this micro-batch in the global denominator of its step."""
        raise NotImplementedError

    def loss(self, hidden_ND: torch.Tensor, head: Any, batch: Batch, denominator: float) -> Loss:
        """Loss of one micro-batch, divided by `denominator`.

        Args:
            hidden_ND: last hidden states of the rows `batch.supervised_N`, in that order.
            head: called with `hidden_ND` and labels it is the fused loss.
        """
        raise NotImplementedError


@dataclass(kw_only=True, slots=True)
class TokenLoss(Objective):
    """Cross-entropy of the supervised tokens.

    Reference, with logits_NV = head(hidden_ND):

        loss = (F.cross_entropy(logits_NV, labels_N, reduction="none") * weight_N).sum()
        loss = loss / denominator
    """

    def count(self, batch: Batch) -> float:
        """Sum of the token weights."""
        return batch.weight_sum

    def loss(self, hidden_ND: torch.Tensor, head: Any, batch: Batch, denominator: float) -> Loss:
        """Fused with the head."""
        from posttrain_dist.flow import Loss

        result = head(
            hidden_ND,
            batch.labels_N,
            token_weight=batch.weight_N,
            channel=batch.channel_N,
            denominator=denominator,
        )
        return Loss(result.loss, result.channels_C4, result.nll_N, result.correct_N)
