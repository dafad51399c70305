"""The output head in torch: chunk by chunk over rows, its gradient made in the forward.

    for each chunk of rows:
        logits_BV  = hidden_BD @ weight.T + bias        in the dtype of the input
        statistics and d loss / d logits of each row    in float32, written over logits_BV
        grad_hidden_BD  = dlogits_BV @ weight
        grad_weight_VD += dlogits_BV.T @ hidden_BD      in float32 where there are many chunks

At no time are more than B x V logits alive, and backward only multiplies the saved gradients by
its argument. The weight is read in the forward alone: under ZeRO-3 it is gone by backward.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from posttrain_kernels.targets import Rows, Targets, statistics_dtype

# Float32 elements of a strip of rows: on a CPU its passes stay in cache, on a GPU it is large
# enough to hide the launches of its kernels.
STRIP_ELEMENTS_CPU = 1 << 18
STRIP_ELEMENTS_GPU = 1 << 25


@dataclass(frozen=True, slots=True)
class Plan:
    """How the work is cut and which gradients are made."""

    chunk_rows: int
    hidden: bool
    weight: bool
    bias: bool

    @property
    def any(self) -> bool:
        """Whether any gradient is made."""
        return self.hidden or self.weight or self.bias


def chunked_rows(
    hidden_TD: torch.Tensor,
    weight_VD: torch.Tensor,
    bias_V: torch.Tensor | None,
    targets: Targets,
    chunk_rows: int | None = None,
) -> Rows:
    """Same result as `reference_rows`, with B x V logits alive.

    Args:
        chunk_rows: B; None chooses by `default_chunk_rows`.
    """
    # Asked here: inside a Function's forward grad mode is always off.
    enabled = torch.is_grad_enabled()
    plan = Plan(
        chunk_rows=chunk_rows or default_chunk_rows(hidden_TD, weight_VD, enabled),
        hidden=enabled and hidden_TD.requires_grad,
        weight=enabled and weight_VD.requires_grad,
        bias=enabled and bias_V is not None and bias_V.requires_grad,
    )
    rows = _Chunked.apply(hidden_TD, weight_VD, bias_V, targets, plan)  # type: ignore[no-untyped-call]
    return Rows(*rows)


def default_chunk_rows(hidden_TD: torch.Tensor, weight_VD: torch.Tensor, enabled: bool) -> int:
    """Rows of a chunk whose logits take 1 GiB if grad_weight is added up over chunks, else 256 MiB.

    A trainable head reads and writes its V x D sum of gradients once a chunk, which costs little
    only where a chunk has thousands of rows; a frozen one is as fast with some hundreds.
    """
    large = enabled and weight_VD.requires_grad and hidden_TD.is_cuda
    row_bytes = weight_VD.shape[0] * hidden_TD.element_size()
    rows = (1 << 30 if large else 1 << 28) // max(row_bytes, 1)
    return max(128, rows // 128 * 128)


class _Gradients(NamedTuple):
    hidden_ND: torch.Tensor | None
    weight_VD: torch.Tensor | None
    bias_V: torch.Tensor | None


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: torch.Tensor,
        weight_VD: torch.Tensor,
        bias_V: torch.Tensor | None,
        targets: Targets,
        plan: Plan,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        nll_N, correct_N, gradients = _run(hidden_TD, weight_VD, bias_V, targets, plan)
        ctx.num_rows = hidden_TD.shape[0]
        # Saved through autograd, so that the hooks of activation checkpointing see them.
        ctx.save_for_backward(*gradients, targets.supervised_N)
        ctx.mark_non_differentiable(nll_N, correct_N)
        return targets.total(nll_N), nll_N, correct_N

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_loss: torch.Tensor, *_: Any) -> tuple[torch.Tensor | None, ...]:
        hidden_ND, weight_VD, bias_V, supervised_N = ctx.saved_tensors
        hidden_TD = None if hidden_ND is None else hidden_ND * grad_loss
        if hidden_TD is not None and supervised_N is not None:
            # Adding, not copying: the same row may be supervised twice.
            zeros_TD = hidden_TD.new_zeros(ctx.num_rows, hidden_TD.shape[1])
            hidden_TD = zeros_TD.index_add_(0, supervised_N, hidden_TD)
        weight_VD = None if weight_VD is None else weight_VD * grad_loss
        bias_V = None if bias_V is None else bias_V * grad_loss
        return hidden_TD, weight_VD, bias_V, None, None


def _run(
    hidden_TD: torch.Tensor,
    weight_VD: torch.Tensor,
    bias_V: torch.Tensor | None,
    targets: Targets,
    plan: Plan,
) -> tuple[torch.Tensor, torch.Tensor, _Gradients]:
    used_ND = targets.select(hidden_TD)
    num_rows, num_chunks = len(used_ND), -(-len(used_ND) // plan.chunk_rows)
    # Chunks of equal size: a small last one would cost a whole pass over grad_weight.
    chunk_rows = -(-num_rows // max(num_chunks, 1))
    dtype = statistics_dtype(hidden_TD.dtype)
    nll_N = torch.empty(num_rows, dtype=dtype, device=hidden_TD.device)
    correct_N = torch.empty(num_rows, dtype=torch.bool, device=hidden_TD.device)
    buffer_BV = hidden_TD.new_empty(chunk_rows, weight_VD.shape[0])
    grad_ND = torch.empty_like(used_ND) if plan.hidden else None
    # One chunk's product is final as it is; a sum of many is kept in the wider dtype.
    sum_dtype = hidden_TD.dtype if num_chunks <= 1 else dtype
    grad_VD = _Sum(weight_VD.shape, sum_dtype) if plan.weight else None
    grad_V = weight_VD.new_zeros(weight_VD.shape[0], dtype=dtype) if plan.bias else None

    for start in range(0, num_rows, max(chunk_rows, 1)):
        rows = slice(start, start + chunk_rows)
        used_BD = used_ND[rows]
        logits_BV = buffer_BV[: len(used_BD)]
        if bias_V is None:
            torch.mm(used_BD, weight_VD.t(), out=logits_BV)
        else:
            torch.addmm(bias_V, used_BD, weight_VD.t(), out=logits_BV)
        _row_pass(logits_BV, targets, rows, nll_N[rows], correct_N[rows], plan.any)
        if grad_ND is not None:
            torch.mm(logits_BV, weight_VD, out=grad_ND[rows])
        if grad_VD is not None:
            grad_VD.add_product(logits_BV.t(), used_BD)
        if grad_V is not None:
            grad_V += logits_BV.sum(dim=0, dtype=dtype)

    gradients = _Gradients(
        grad_ND,
        None if grad_VD is None else grad_VD.result(like=weight_VD),
        None if grad_V is None or bias_V is None else grad_V.to(bias_V.dtype),
    )
    return nll_N, correct_N, gradients


class _Sum:
    """A sum of matrix products; the first one is written, later ones are added."""

    def __init__(self, shape: torch.Size, dtype: torch.dtype) -> None:
        self.shape, self.dtype = shape, dtype
        self.total: torch.Tensor | None = None

    def add_product(self, left: torch.Tensor, right: torch.Tensor) -> None:
        if self.total is None:
            self.total = torch.mm(left, right).to(self.dtype)
        elif self.dtype == left.dtype:
            self.total.addmm_(left, right)
        else:
            self.total += torch.mm(left, right)

    def result(self, like: torch.Tensor) -> torch.Tensor:
        if self.total is None:
            return torch.zeros(self.shape, dtype=like.dtype, device=like.device)
        return self.total.to(like.dtype)


def _row_pass(
    logits_BV: torch.Tensor,
    targets: Targets,
    rows: slice,
    nll_B: torch.Tensor,
    correct_B: torch.Tensor,
    with_gradient: bool,
) -> None:
    """Fill `nll_B` and `correct_B`; turn `logits_BV` into d loss / d logits, in place."""
    label_B1 = targets.labels_N[rows, None]
    weight_B1 = targets.weight_N[rows, None] * targets.scale
    elements = STRIP_ELEMENTS_GPU if logits_BV.is_cuda else STRIP_ELEMENTS_CPU
    strip_rows = max(1, elements // logits_BV.shape[1])
    for start in range(0, len(logits_BV), strip_rows):
        strip = slice(start, start + strip_rows)
        nll_B1, correct_B1 = _strip_pass(
            logits_BV[strip], label_B1[strip], weight_B1[strip], targets, with_gradient
        )
        nll_B[strip], correct_B[strip] = nll_B1[:, 0], correct_B1[:, 0]


def _strip_pass(
    logits_BV: torch.Tensor,
    label_B1: torch.Tensor,
    weight_B1: torch.Tensor,
    targets: Targets,
    with_gradient: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """With z = shaped logits, p = softmax(z):

    nll = log(sum(exp(z - max))) - (z[label] - max)
    d loss / d z = weight * (p - onehot(label)),  and p[label] - 1 = expm1(-nll)
    """
    z_BV = logits_BV.to(weight_B1.dtype)  # the same memory where the dtype is the same
    slope_BV = None  # dz / d logits, as far as it differs between the elements of a row
    if targets.softcap is None:
        if targets.logit_scale != 1:
            z_BV *= targets.logit_scale
    else:
        z_BV.mul_(targets.logit_scale / targets.softcap).tanh_()
        if with_gradient:
            slope_BV = 1 - z_BV.square()
        z_BV *= targets.softcap
    z_BV -= z_BV.amax(dim=1, keepdim=True)
    own_B1 = z_BV.gather(1, label_B1)
    sum_B1 = z_BV.exp_().sum(dim=1, keepdim=True)
    nll_B1 = sum_B1.log() - own_B1
    if with_gradient:
        weight_B1 = weight_B1 * targets.logit_scale
        z_BV *= weight_B1 / sum_B1
        z_BV.scatter_(1, label_B1, weight_B1 * torch.expm1(-nll_B1))
        if slope_BV is not None:
            z_BV *= slope_BV
        if z_BV is not logits_BV:
            logits_BV.copy_(z_BV)
    return nll_B1, own_B1 == 0
