"""Per-token log-probabilities whose gradients are weighed by whoever uses them."""

from __future__ import annotations

import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from grids import grid
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

cases = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("head_cases.py"))))
FUSED = ["torch", "triton"]


def direct(logprob_N: torch.Tensor, entropy_N: torch.Tensor | None, seed: int = 5) -> torch.Tensor:
    """A loss that weighs each token otherwise, with both signs, as a policy gradient does."""
    random = torch.Generator().manual_seed(seed)
    loss = (logprob_N * torch.randn(len(logprob_N), generator=random)).sum()
    if entropy_N is not None:
        loss = loss + (entropy_N * torch.randn(len(entropy_N), generator=random)).sum()
    return loss


def fused(case, dtype: torch.dtype, *, entropy: bool = False, **options: Any) -> dict:
    case = case.in_dtype(dtype)
    result = case.logprob(entropy=entropy, **options)
    loss = direct(result.logprob_N, result.entropy_N)
    loss.backward()
    return cases.results(case, loss, result.logprob_N.detach())


def plain(entropy: bool):
    def eager(case, dtype: torch.dtype) -> dict:
        case = case.in_dtype(dtype)
        log_p_NV = cases.eager_log_p(case)
        logprob_N = log_p_NV[torch.arange(len(case.labels_N)), case.labels_N]
        entropy_N = -(log_p_NV.exp() * log_p_NV).sum(dim=1) if entropy else None
        loss = direct(logprob_N, entropy_N)
        loss.backward()
        return cases.results(case, loss, logprob_N.detach())

    return eager


@grid(
    dtype=[torch.float32, torch.bfloat16, torch.float16],
    impl=FUSED,
    masked=[0, 0.75],
    entropy=[False, True],
)
def test_error_is_at_most_that_of_eager(
    dtype: torch.dtype, impl: str, masked: float, entropy: bool
) -> None:
    case = cases.make_case(masked, 16, bias=True)  # Triton's interpreter takes 10 ms a row
    cases.assert_as_good_as_eager(
        case, dtype, fused, plain(entropy), impl=impl, entropy=entropy, chunk_rows=7
    )


@pytest.mark.parametrize("impl", [*FUSED, "reference"])
@pytest.mark.parametrize("trained", ["all", "hidden"])
def test_gradcheck(impl: str, trained: str) -> None:
    case = cases.make_case(
        0.4, rows=5, width=2, vocabulary=3, bias=True, softcap=3.0, logit_scale=0.7
    ).in_dtype(torch.float64)
    case.labels_N[1] = -100
    entropy = trained == "all"
    case.weight_VD.requires_grad_(entropy)
    case.bias.requires_grad_(entropy)

    def values(hidden_TD, weight_VD, bias):
        moved = cases.replace(case, hidden_TD=hidden_TD, weight_VD=weight_VD, bias=bias)
        result = moved.logprob(entropy=entropy, impl=impl, chunk_rows=2)
        return (result.logprob_N, result.entropy_N) if entropy else result.logprob_N

    assert torch.autograd.gradcheck(values, (case.hidden_TD, case.weight_VD, case.bias))


@pytest.mark.parametrize(("products", "trained"), [(4, True), (2, False)])
def test_a_frozen_head_is_not_computed_twice(products: int, trained: bool) -> None:
    """Trained: logits, logits again, two gradients. Frozen: logits and the gradient of hidden."""
    case = cases.make_case(0.75, rows=64).in_dtype(torch.float32)
    case.weight_VD.requires_grad_(trained)
    with FlopCounterMode(display=False) as counter:
        direct(case.logprob(chunk_rows=16).logprob_N, None).backward()
    assert counter.get_total_flops() == products * 2 * 16 * 19 * 203


def test_tiny_gradients_survive_in_float16() -> None:
    case = cases.make_case(0.2).in_dtype(torch.float16)
    exact = cases.replace(case).in_dtype(torch.float64)
    for each in (case, exact):
        (direct(each.logprob().logprob_N, None) * 1e-4).backward()
    ours, wanted = case.weight_VD.grad.double(), exact.weight_VD.grad
    assert float((ours - wanted).norm()) < 5e-3 * float(wanted.norm())


def test_weight_is_read_again_in_backward() -> None:
    """ZeRO-3 frees a parameter after forward, and has it back, the same object, for backward."""
    case = cases.make_case(0.3)
    wanted, case = fused(case, torch.float32), case.in_dtype(torch.float32)
    head = nn.Parameter(case.weight_VD.detach().clone())
    kept = head.data.clone()
    result = cases.replace(case, weight_VD=head).logprob()
    loss = direct(result.logprob_N, None)
    head.data = torch.empty(0)
    head.data = kept
    loss.backward()
    assert torch.equal(head.grad, wanted["weight_VD"])


def test_no_grad_gives_the_same_numbers() -> None:
    case = cases.make_case(0.3).in_dtype(torch.bfloat16)
    with torch.no_grad():
        evaluated = case.logprob(entropy=True)
    trained = case.logprob(entropy=True)
    assert torch.equal(evaluated.logprob_N, trained.logprob_N.detach())
    assert torch.equal(evaluated.entropy_N, trained.entropy_N.detach())
    assert torch.equal(evaluated.logprob_N, -case.head().nll_N)
    assert torch.equal(evaluated.correct_N, case.head().correct_N)
