"""What an objective is, and the token loss that SFT and pretraining share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

if TYPE_CHECKING:
    import torch

    from posttrain_dist.flow import Batch, Loss


@dataclass(kw_only=True, slots=True)
class Objective:
    """The slot `objective`: a dataclass whose fields are its knobs.

    `count` gives the share of a micro-batch in the step's denominators; `loss` the already
    normalised loss. `rows` names what data it reads: "messages" or "text".
    """

    rows: ClassVar[str] = "messages"

    def count(self, batch: Batch) -> Any:
        """A named tuple: this micro-batch's share in the denominator of each loss component."""
        raise NotImplementedError

    def loss(self, hidden_ND: torch.Tensor, head: Any, batch: Batch, denominators: Any) -> Loss:
        """Loss of one micro-batch, each component divided by its global denominator.

        Args:
            hidden_ND: last hidden states of the rows `batch.supervised_N`, in that order.
            head: called with `hidden_ND` and labels it is the fused loss.
        """
        raise NotImplementedError


class TokenCount(NamedTuple):
    """The one loss component of a token loss."""

    tokens: float  # sum of the token weights


@dataclass(kw_only=True, slots=True)
class TokenLoss(Objective):
    """Cross-entropy of the supervised tokens.

    Reference, with logits_NV = head(hidden_ND):

        loss = (F.cross_entropy(logits_NV, labels_N, reduction="none") * weight_N).sum()
        loss = loss / denominators.tokens
    """

    def count(self, batch: Batch) -> TokenCount:
        """Sum of the token weights."""
        return TokenCount(batch.weight_sum)

    def loss(
        self, hidden_ND: torch.Tensor, head: Any, batch: Batch, denominators: TokenCount
    ) -> Loss:
        """Fused with the head."""
        from posttrain_dist.flow import Loss

        result = head(
            hidden_ND,
            batch.labels_N,
            token_weight=batch.weight_N,
            channel=batch.channel_N,
            denominator=denominators.tokens,
        )
        return Loss(result.loss, result.channels_C4, result.nll_N, result.correct_N)
