"""The output head: the model's own lm_head module, with the fused operations in its forward.

Being the real module, its hooks fire under ZeRO-3, which bring its weight, and the weight may be
tied to the embedding. Whoever wants a loss or log-probabilities asks `Head`, which calls the
module; called with hidden states alone, the module is the plain projection that it was.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from posttrain_dist.errors import ModelError
from posttrain_dist.models import parity
from posttrain_dist.models.shape import ModelShape


class HeadKernels(NamedTuple):
    """The fused operations, handed over by the assembly: functions of posttrain_kernels."""

    linear_cross_entropy: Callable[..., Any]
    linear_logprob: Callable[..., Any]


class Head:
    """Losses and log-probabilities of hidden states, through the lm_head `module`.

    Args:
        shape: its softcap and logit scale are part of every operation.
        num_channels: C, rows of the channel tables.
    """

    def __init__(
        self, module: nn.Module, shape: ModelShape, kernels: HeadKernels, num_channels: int
    ) -> None:
        self.module, self.num_channels = module, num_channels
        self._kernels = kernels
        self._scale = shape.logit_scale
        self._softcap = {"softcap": shape.softcap}
        module.forward = _forward_of(module)

    def loss(
        self,
        hidden_ND: torch.Tensor,
        labels_N: torch.Tensor,
        *,
        denominator: float,
        **options: Any,
    ) -> Any:
        """Weighted cross-entropy divided by `denominator`: a `posttrain_kernels.HeadLoss`.

        Args:
            options: `token_weight`, `channel`, `z_loss`, `entropy` of
                `posttrain_kernels.linear_cross_entropy`.
        """
        options |= {"denominator": denominator, "num_channels": self.num_channels}
        return self._call(
            self._kernels.linear_cross_entropy, hidden_ND, labels_N, self._scale, options
        )

    def logprob(
        self,
        hidden_ND: torch.Tensor,
        labels_N: torch.Tensor,
        *,
        temperature: float = 1.0,
        **options: Any,
    ) -> Any:
        """log p(label) of each row, differentiable: a `posttrain_kernels.LogProb`.

        Args:
            temperature: what the logits are divided by.
            options: `entropy` of `posttrain_kernels.linear_logprob`.

        Raises:
            ModelError: a temperature other than 1 of a head that caps its logits: the operation
                divides them before the cap, and they are to be divided behind it.
        """
        if temperature != 1.0 and self._softcap["softcap"]:
            raise ModelError(
                f"the head caps its logits, so they cannot be divided by {temperature}",
                where="temperature",
                fix="use a temperature of 1",
            )
        scale = self._scale / temperature
        return self._call(self._kernels.linear_logprob, hidden_ND, labels_N, scale, options)

    def compare(
        self, hidden_ND: torch.Tensor, labels_N: torch.Tensor, **options: Any
    ) -> parity.Parity:
        """The fused loss beside its reference, gradients too; see `parity.compare`."""
        options |= {"logit_scale": self._scale, **self._softcap}
        function = self._kernels.linear_cross_entropy
        found: parity.Parity = self.module(
            hidden_ND,
            lambda hidden, weight, bias: parity.compare(
                function, hidden, weight, bias, labels_N, **options
            ),
        )
        return found

    def _call(
        self,
        kernel: Callable[..., Any],
        hidden_ND: torch.Tensor,
        labels_N: torch.Tensor,
        logit_scale: float,
        options: dict[str, Any],
    ) -> Any:
        options |= {"logit_scale": logit_scale, **self._softcap}
        return self.module(
            hidden_ND,
            lambda hidden, weight, bias: kernel(hidden, weight, labels_N, bias=bias, **options),
        )


def _forward_of(module: nn.Module) -> Callable[..., Any]:
    """forward(hidden, operation): `operation(hidden, weight, bias)` while the weight is here."""

    def forward(hidden: torch.Tensor, operation: Callable[..., Any] = nn.functional.linear) -> Any:
        return operation(hidden, module.weight, getattr(module, "bias", None))

    return forward
