"""The output head: the model's own lm_head module, with the fused operations in its forward.

Being the real module, its hooks fire under ZeRO-3, which bring its weight, and the weight may be
tied to the embedding. Whoever wants a loss or log-probabilities asks `Head`, which calls the
module; called with hidden states alone, the module is the plain projection that it was. It may be
a LoRA layer of `peft`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from posttrain_dist.errors import ModelError
from posttrain_dist.models import parity
from posttrain_dist.models.embeddings.added_tokens import ADAPTER, with_rows
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
        lora = _lora_of(module)
        module.forward = _forward_of(module) if lora is None else _lora_forward(module, lora)

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
        options["trained"] = any(each.requires_grad for each in self.module.parameters())
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


def _forward_of(module: Any) -> Callable[..., Any]:
    """forward(hidden, operation): `operation(hidden, weight, bias)` while the weight is here.

    Rows of it that are trained alone, those of added tokens, are in it.
    """

    def forward(hidden: torch.Tensor, operation: Callable[..., Any] = nn.functional.linear) -> Any:
        weight, bias = module.weight, getattr(module, "bias", None)
        rows = getattr(module, ADAPTER, None)
        if rows is None:
            return operation(hidden, weight, bias)
        return rows(hidden, lambda *trained: operation(hidden, with_rows(weight, *trained), bias))

    return forward


# ------------------------------------------------------------------------- with LoRA on the head
#
# Of a `LoraLayer` of peft `weight` is that of the base: an operation that reads it would train
# neither A nor B. And one that reads `lora_A.weight` would meet a shard under ZeRO-3, where a
# module's weights are whole only while it is called. So each module is called inside the other,
# with the hidden states, to which the hooks for backward are tied, and hands its weight inwards.


class _Lora(NamedTuple):
    """The parts of a `LoraLayer` with one adapter."""

    base: nn.Module
    a: nn.Module  # its weight is [r, D]
    b: nn.Module  # [V, r]
    magnitude: nn.Module | None  # [V], of DoRA
    scale: float


def _lora_of(module: Any) -> _Lora | None:
    """The parts, if `peft` put a layer there; found by its attributes."""
    if not hasattr(module, "base_layer"):
        return None
    if not getattr(module, "lora_A", None):
        raise ModelError(
            f"the head is a {type(module).__module__}.{type(module).__name__}, which the fused "
            "loss does not know",
            where="tuning.targets",
            fix="leave the head out of tuning.targets",
        )
    (adapter,) = module.lora_A  # one that is trained; generation with several goes another way
    magnitudes = dict(module.lora_magnitude_vector.items())
    return _Lora(
        module.base_layer,
        module.lora_A[adapter],
        module.lora_B[adapter],
        magnitudes.get(adapter),
        float(module.scaling[adapter]),
    )


def _lora_forward(module: Any, lora: _Lora) -> Callable[..., Any]:
    """forward(hidden, operation) of W x + scale B A x, as one product with [W, B].

        [x, scale A x] @ [W, B].T = W x + scale B A x

    Not with W + scale B A, for in 16 bits a small change of a weight rounds to none.
    """

    def bias_of(base: nn.Module) -> Any:
        return getattr(base, "bias", None)

    parts = [lora.a, lora.b, lora.base, *([] if lora.magnitude is None else [lora.magnitude])]
    for part in parts:
        part.forward = _give_weight(part)

    def forward(hidden: torch.Tensor, operation: Callable[..., Any] = nn.functional.linear) -> Any:
        if module.disable_adapters:
            return lora.base(hidden, lambda weight: operation(hidden, weight, bias_of(lora.base)))

        def descend(*weights: torch.Tensor) -> Any:
            if len(weights) < len(parts):
                return parts[len(weights)](hidden, lambda weight: descend(*weights, weight))
            a_RD, b_VR, weight_VD, *magnitude = weights
            low = nn.functional.linear(hidden, a_RD) * lora.scale
            both_VE = torch.cat([weight_VD, b_VR], dim=1)
            if magnitude:
                factor_V = _row_factor(weight_VD, a_RD, b_VR, magnitude[0], lora.scale)
                both_VE = both_VE * factor_V[:, None]
            return operation(torch.cat([hidden, low], dim=-1), both_VE, bias_of(lora.base))

        return descend()

    return forward


def _give_weight(module: Any) -> Callable[..., Any]:
    def forward(hidden: torch.Tensor, inner: Callable[[torch.Tensor], Any]) -> Any:
        return inner(module.weight)

    return forward


def _row_factor(
    weight_VD: torch.Tensor,
    a_RD: torch.Tensor,
    b_VR: torch.Tensor,
    m_V: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """m / |W + scale B A| of each row; the length is constant in backward (DoRA, section 4.3)."""
    with torch.no_grad():
        length_V = torch.linalg.norm(weight_VD + scale * (b_VR @ a_RD), dim=1)
    factor_V: torch.Tensor = m_V / length_V
    return factor_V
