"""Ready logits: the same loss, statistics and gradients as the head that made them."""

from __future__ import annotations

import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from posttrain_kernels import cross_entropy

cases = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("head_cases.py"))))


def arguments(case) -> dict:
    names = ("labels_N", "supervised", "token_weight", "channel", "num_channels", "denominator")
    return {n: getattr(case, n) for n in (*names, "softcap", "logit_scale", "z_loss")}


@pytest.mark.parametrize("impl", ["torch", "triton", "reference"])
@pytest.mark.parametrize("masked", [0, 0.75, 1])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_agrees_with_the_head(impl: str, masked: float, softcap: float | None) -> None:
    case = cases.make_case(masked, 16, softcap=softcap, logit_scale=1.5, z_loss=0.01)
    case = case.in_dtype(torch.float64)
    wanted = case.head(impl="reference", entropy=True)
    wanted.loss.backward()
    logits_TV = (case.hidden_TD @ case.weight_VD.T).detach().requires_grad_()
    before_TV = logits_TV.detach().clone()
    ours = cross_entropy(logits_TV, **arguments(case), impl=impl, entropy=True)
    (2 * ours.loss).backward()
    for ours_tensor, wanted_tensor in zip(ours, wanted, strict=True):
        torch.testing.assert_close(ours_tensor, wanted_tensor)
    hidden_TD = logits_TV.grad @ case.weight_VD
    torch.testing.assert_close(hidden_TD / 2, case.hidden_TD.grad)
    assert torch.equal(logits_TV, before_TV)


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_gradcheck(impl: str) -> None:
    case = cases.make_case(0.4, rows=5, width=3, vocabulary=4, z_loss=0.1)
    logits_TV = (case.hidden_TD @ case.weight_VD.T).double().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: cross_entropy(x, **arguments(case), impl=impl).loss, logits_TV
    )


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_gradient_is_rounded_like_its_dtype(impl: str, dtype: torch.dtype) -> None:
    case = cases.make_case(0.3, 16)
    logits_TV = (case.hidden_TD @ case.weight_VD.T).to(dtype)
    grads = []
    for copy_TV in (logits_TV.clone().requires_grad_(), logits_TV.double().requires_grad_()):
        cross_entropy(copy_TV, **arguments(case), impl=impl).loss.backward()
        grads.append(copy_TV.grad.double())
    # A unit of the last place: Triton's interpreter truncates where a GPU rounds. Float16 twice,
    # as p - onehot and divided by the denominator.
    step = {torch.bfloat16: 2**-7, torch.float16: 2**-9, torch.float32: 2e-6}[dtype]
    assert bool(((grads[0] - grads[1]).abs() <= step * grads[1].abs() + 1e-7).all())


def test_bad_logits_are_refused() -> None:
    labels_N = torch.zeros(3, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"logits_TV must be \[T, V\], it is \[3\]"):
        cross_entropy(torch.zeros(3), labels_N, denominator=1)
    with pytest.raises(ValueError, match=r"labels_N holds 4, outside \[0, 4\)"):
        cross_entropy(torch.zeros(3, 4), labels_N + 4, denominator=1)
