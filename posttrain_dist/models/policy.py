"""Policy: the module that an engine wraps; backbone, head and objective in one forward.

The head is the model's own lm_head module with its forward replaced: called with labels it is
the fused loss, called without it is the plain projection. Being the real module, its hooks fire
under ZeRO-3 and its weight may be tied to the embedding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from posttrain_dist.errors import ModelError
from posttrain_dist.flow import Batch, Loss
from posttrain_dist.models import parity
from posttrain_dist.models.last_layer import select_supervised_rows
from posttrain_dist.models.shape import HeadShape, head_shape


class Policy(nn.Module):
    """A causal LM as `forward(batch, objective, denominators) -> Loss`.

    Args:
        causal_lm: a transformers `…ForCausalLM` with a backbone and an output embedding.
        linear_cross_entropy: the fused head, handed over by the assembly
            (signature of `posttrain_kernels.linear_cross_entropy`).
        num_channels: C, rows of the channel table.
    """

    def __init__(
        self,
        causal_lm: nn.Module,
        linear_cross_entropy: Callable[..., Any],
        num_channels: int,
    ) -> None:
        super().__init__()
        self.causal_lm = causal_lm
        self.config: Any = causal_lm.config
        head = causal_lm.get_output_embeddings()  # type: ignore[operator]
        shape = head_shape(causal_lm.config)
        select_supervised_rows(self._backbone)
        head.forward = _fused_forward(head, shape, linear_cross_entropy, num_channels)

    @property
    def head(self) -> nn.Module:
        """The lm_head module, with its fused forward."""
        head: nn.Module = self.causal_lm.get_output_embeddings()  # type: ignore[operator]
        return head

    @property
    def _backbone(self) -> nn.Module:
        backbone: nn.Module = getattr(self.causal_lm, str(self.causal_lm.base_model_prefix))
        return backbone

    def hidden(self, batch: Batch) -> torch.Tensor:
        """Last hidden states [N, D], after the final norm, of the rows `batch.supervised_N`."""
        output = self._backbone(**_inputs(batch), supervised_N=batch.supervised_N)
        hidden_ND: torch.Tensor = output.last_hidden_state[0]
        return hidden_ND

    def forward(self, batch: Batch, objective: Any, denominators: Any) -> Loss:
        """Loss of one micro-batch, divided by the step's global `denominators`."""
        loss: Loss = objective.loss(self.hidden(batch), self.head, batch, denominators)
        return loss

    @torch.no_grad()
    def check_head(self, batch: Batch, objective: Any) -> float:
        """Compare the fused loss with the model's own logits; returns the largest difference.

        A softcap or logit scale that the fused head does not know, or a last layer whose MLP does
        not work row by row, would train another model than the one that is served.

        Raises:
            ModelError: a token's loss differs by more than rounding.
        """
        ones = type(count := objective.count(batch))(*(1.0 for _ in count))
        fused = self(batch, objective, ones).nll_N
        logits_TV = self.causal_lm(**_inputs(batch)).logits[0]  # of all rows, by no path of ours
        logits_NV = logits_TV[batch.supervised_N].float()
        own = nn.functional.cross_entropy(logits_NV, batch.labels_N, reduction="none")
        difference = float((fused - own).abs().max()) if len(own) else 0.0
        largest = float(own.abs().max()) if len(own) else 0.0
        tolerance = (2e-5 if logits_TV.dtype == torch.float32 else 3e-2) * max(1.0, largest)
        if not difference <= tolerance:
            name = type(self.causal_lm).__name__
            raise ModelError(
                f"the fused loss differs from the logits of {name} by {difference:.2e} "
                f"(tolerance {tolerance:.0e}): its head does more than softcap and logit scale, or "
                "the MLP of its last layer mixes rows",
                where="model.path",
                fix="this architecture is not supported yet",
            )
        return difference

    @torch.no_grad()
    def check_parity(self, batch: Batch) -> dict[str, float]:
        """The fused head beside its reference on targets of `batch`; see models/parity.py.

        Collective over ranks that share a sharded head. A batch without targets differs by 0.

        Raises:
            ModelError: loss, a token's loss or a gradient differs by more than rounding.
        """
        weight: Any = self.head.weight
        places_N = parity.some_targets(batch)
        weight_N = batch.weight_N[places_N]
        found = self.head(
            self.hidden(batch)[places_N],
            batch.labels_N[places_N],
            token_weight=weight_N,
            denominator=float(weight_N.sum()),
            compare=True,
        )
        return parity.check(found, weight.dtype)


def _inputs(batch: Batch) -> dict[str, Any]:
    """Keywords of a backbone; those it does not know travel through it to the attention."""
    return {
        "input_ids": batch.input_ids_T[None],
        "position_ids": batch.position_ids_T[None],
        "cu_seqlens": batch.cu_seqlens_S,
        "bounds_S": batch.bounds_S,
        "max_seqlen": batch.max_seqlen,
        "use_cache": False,
    }


def _fused_forward(
    head: nn.Module, shape: HeadShape, linear_cross_entropy: Callable[..., Any], num_channels: int
) -> Callable[..., Any]:
    def forward(
        hidden: torch.Tensor,
        labels_N: torch.Tensor | None = None,
        *,
        compare: bool = False,
        **options: Any,
    ) -> Any:
        weight: Any = head.weight
        bias = getattr(head, "bias", None)
        if labels_N is None:
            return nn.functional.linear(hidden, weight, bias)
        options |= {"softcap": shape.softcap, "logit_scale": shape.logit_scale}
        if compare:
            return parity.compare(linear_cross_entropy, hidden, weight, bias, labels_N, **options)
        return linear_cross_entropy(
            hidden, weight, labels_N, bias=bias, num_channels=num_channels, **options
        )

    return forward
