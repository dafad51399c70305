"""Problems for the output head, a truth in float64 that is written here, and plain eager torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from posttrain_kernels import HeadLoss, LogProb, linear_cross_entropy, linear_logprob
from torch import nn

GRADIENTS = ("hidden_TD", "weight_VD", "bias")
PER_TOKEN = ("labels_N", "supervised", "token_weight", "channel")


@dataclass
class Case:
    """One head problem; `arguments` are the keywords of linear_cross_entropy beside tensors."""

    hidden_TD: torch.Tensor
    weight_VD: torch.Tensor
    labels_N: torch.Tensor
    supervised: torch.Tensor | None
    token_weight: torch.Tensor
    channel: torch.Tensor
    bias: torch.Tensor | None
    denominator: float
    softcap: float | None = None
    logit_scale: float = 1.0
    num_channels: int = 5
    z_loss: float = 0.0

    def in_dtype(self, dtype: torch.dtype) -> Case:
        """Fresh leaves, so that gradients of two computations never mix."""
        fresh = {
            name: getattr(self, name).detach().to(dtype, copy=True).requires_grad_()
            for name in GRADIENTS
            if getattr(self, name) is not None
        }
        return replace(self, **fresh)

    def head(self, **options: Any) -> HeadLoss:
        return linear_cross_entropy(**{**vars(self), **options})

    def logprob(self, **options: Any) -> LogProb:
        names = ("hidden_TD", "weight_VD", "labels_N", "supervised", "bias", "softcap")
        arguments = {name: getattr(self, name) for name in (*names, "logit_scale")}
        return linear_logprob(**{**arguments, **options})


def make_case(
    masked: float = 0.5,
    rows: int = 61,
    width: int = 19,
    vocabulary: int = 203,
    bias: bool = False,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> Case:
    """Peaked logits (random ones hide mistakes in rare tokens), uneven weights, one 0 weight."""
    random = torch.Generator().manual_seed(seed)
    num_used = round(rows * (1 - masked))
    weight_N = torch.rand(num_used, generator=random) + 0.1
    weight_N[1:2] = 0
    return Case(
        hidden_TD=torch.randn(rows, width, generator=random).to(dtype),
        weight_VD=torch.randn(vocabulary, width, generator=random).to(dtype),
        labels_N=torch.randint(vocabulary, (num_used,), generator=random),
        supervised=torch.randperm(rows, generator=random)[:num_used] if masked else None,
        token_weight=weight_N,
        channel=torch.randint(4, (num_used,), generator=random),  # channel 4 stays empty
        bias=torch.randn(vocabulary, generator=random).to(dtype) if bias else None,
        denominator=float(weight_N.double().sum()) * 1.7 or 1.0,  # as if other ranks had more
        **options,
    )


def eager_log_p(case: Case) -> torch.Tensor:
    """log p of every token of the vocabulary, the plain way: logits in the dtype of the input,
    then log-softmax in float32 (float64 for float64)."""
    wide = torch.promote_types(case.hidden_TD.dtype, torch.float32)
    return torch.log_softmax(eager_logits(case).to(wide), dim=1)


def eager_logits(case: Case) -> torch.Tensor:
    wide = torch.promote_types(case.hidden_TD.dtype, torch.float32)
    used_ND = case.hidden_TD if case.supervised is None else case.hidden_TD[case.supervised]
    logits_NV = nn.functional.linear(used_ND, case.weight_VD, case.bias).to(wide)
    logits_NV = logits_NV * case.logit_scale
    if case.softcap is not None:
        logits_NV = case.softcap * torch.tanh(logits_NV / case.softcap)
    return logits_NV


def eager(case: Case, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    case = case.in_dtype(dtype)
    rows = torch.arange(len(case.labels_N))
    ignored_N = case.labels_N == -100
    nll_N = -eager_log_p(case)[rows, case.labels_N.clamp(min=0)].masked_fill(ignored_N, 0)
    weight_N = case.token_weight.masked_fill(ignored_N, 0)
    penalty_N = case.z_loss * eager_logits(case).logsumexp(dim=1).square()
    loss = ((nll_N + penalty_N) * weight_N).sum() / (case.denominator or 1.0)
    loss.backward()
    return results(case, loss, nll_N.detach())


def fused(case: Case, dtype: torch.dtype, **options: Any) -> dict[str, torch.Tensor]:
    case = case.in_dtype(dtype)
    result = case.head(**options)
    result.loss.backward()
    return results(case, result.loss, result.nll_N)


def results(case: Case, loss: torch.Tensor, nll_N: torch.Tensor) -> dict[str, torch.Tensor]:
    gradients = {n: getattr(case, n).grad for n in GRADIENTS if getattr(case, n) is not None}
    return {"loss": loss.detach(), "nll": nll_N, **gradients}


def assert_as_good_as_eager(
    case: Case,
    dtype: torch.dtype,
    ours: Callable[..., dict[str, torch.Tensor]] = fused,
    plain: Callable[..., dict[str, torch.Tensor]] = eager,
    **options: Any,
) -> None:
    """Each element's error against the float64 truth is at most eager's largest in the same dtype
    and the same tensor, and their norm at most eager's, plus a few roundings of the result.

    A factor stands for the order of sums: two errors of the same kind differ by chance.
    """
    case = case.in_dtype(dtype)  # the truth starts from the same rounded numbers
    truth, other, result = (
        plain(case, torch.float64),
        plain(case, dtype),
        ours(case, dtype, **options),
    )
    for name, exact in truth.items():
        assert result[name] is not None, f"no gradient was made: {name}"
        if exact.numel() == 0:
            continue
        # In 16 bits a result is rounded once more, and logits once.
        rounding = {torch.float32: 4e-7, torch.bfloat16: 4e-3, torch.float16: 6e-4}[dtype]
        error, theirs = (result[name].double() - exact).abs(), (other[name].double() - exact).abs()
        slack = rounding * (exact.abs() + float(exact.abs().max()) / 16) + 1e-12
        worst = float((error - slack).max())
        assert worst <= 1.25 * float(theirs.max()), (
            f"{name}: {worst:.3e} > {float(theirs.max()):.3e}"
        )
        norm, slack_norm = torch.linalg.vector_norm, {torch.float32: 3e-7}.get(dtype, 1e-3)
        # Of few numbers two norms of the same kind of error differ more: 1 / sqrt(n) each.
        chance = max(0.1, 3 * float((exact != 0).sum().clamp(min=1)) ** -0.5)
        allowed = (1 + chance) * float(norm(theirs)) + slack_norm * float(norm(exact))
        assert float(norm(error)) <= allowed, name
