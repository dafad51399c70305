"""The fused output head inside autograd: what it computes, when, and what it leaves alone."""

from __future__ import annotations

import runpy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

cases = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("head_cases.py"))))
make_case, fused, GRADIENTS = cases.make_case, cases.fused, cases.GRADIENTS


@pytest.mark.parametrize("frozen", GRADIENTS)
def test_frozen_inputs_get_no_gradient(frozen: str) -> None:
    case = make_case(bias=True)
    wanted, part = fused(case, torch.float32), case.in_dtype(torch.float32)
    getattr(part, frozen).requires_grad_(False)
    part.head().loss.backward()
    assert getattr(part, frozen).grad is None
    for name in set(GRADIENTS) - {frozen}:
        assert torch.equal(getattr(part, name).grad, wanted[name])


@pytest.mark.parametrize(("products", "mode"), [(1, "no grad"), (2, "frozen"), (3, "trainable")])
def test_work_is_that_of_the_supervised_rows(products: int, mode: str) -> None:
    """Logits, gradient of hidden, gradient of weight: 2 N D V operations each, none twice."""
    case = make_case(0.75, rows=64).in_dtype(torch.float32)
    case.weight_VD.requires_grad_(mode == "trainable")
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(mode != "no grad"):
        loss = case.head(chunk_rows=16, channel=None).loss
        if mode != "no grad":
            loss.backward()
    assert counter.get_total_flops() == products * 2 * 16 * 19 * 203


def test_no_grad_makes_the_same_numbers_and_no_gradient() -> None:
    case = make_case(bias=True, softcap=5.0).in_dtype(torch.bfloat16)
    trained = case.head()
    with torch.no_grad():
        evaluated = case.head()
    assert not evaluated.loss.requires_grad
    assert torch.equal(evaluated.loss, trained.loss) and torch.equal(evaluated.nll_N, trained.nll_N)
    assert torch.equal(evaluated.channels_C4, trained.channels_C4)


def test_inputs_are_left_as_they_were() -> None:
    case = make_case(0, bias=True)
    before = {k: v.clone() for k, v in vars(case).items() if isinstance(v, torch.Tensor)}
    fused(case, torch.float32)
    case.head()
    for name, value in before.items():
        assert torch.equal(getattr(case, name), value), name


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_every_second_number_of_each_row_argument(impl: str) -> None:
    case = make_case(0.5, rows=12)
    wanted = fused(case, torch.float32, impl=impl)
    names = ("labels_N", "supervised", "token_weight", "channel")
    apart = {n: getattr(case, n).repeat_interleave(2)[::2] for n in names}
    for name, value in fused(replace(case, **apart), torch.float32, impl=impl).items():
        assert torch.equal(value, wanted[name]), name


def test_non_contiguous_inputs() -> None:
    case = make_case(0, bias=True).in_dtype(torch.float32)
    wanted = fused(case, torch.float32)
    hidden_DT = case.hidden_TD.detach().t().contiguous().requires_grad_()
    weight_DV = case.weight_VD.detach().t().contiguous().requires_grad_()
    replace(case, hidden_TD=hidden_DT.t(), weight_VD=weight_DV.t()).head().loss.backward()
    assert hidden_DT.grad is not None and weight_DV.grad is not None
    torch.testing.assert_close(hidden_DT.grad.t(), wanted["hidden_TD"])
    torch.testing.assert_close(weight_DV.grad.t(), wanted["weight_VD"])


@pytest.mark.parametrize("reentrant", [False, True])
def test_tied_weights_under_activation_checkpointing(reentrant: bool) -> None:
    """The embedding is the head; both parts of its gradient arrive, recomputed or not."""
    case = make_case(0.5)
    tokens_T = torch.randint(203, (61,), generator=torch.Generator().manual_seed(3))

    def gradient(impl: str, recompute: bool) -> torch.Tensor:
        embedding = nn.Embedding.from_pretrained(case.weight_VD, freeze=False)

        def loss(hidden_TD: torch.Tensor) -> torch.Tensor:
            tied = replace(case, hidden_TD=hidden_TD.tanh(), weight_VD=embedding.weight)
            return tied.head(impl=impl).loss

        hidden_TD = embedding(tokens_T)
        if recompute:
            checkpoint(loss, hidden_TD, use_reentrant=reentrant).backward()
        else:
            loss(hidden_TD).backward()
        assert embedding.weight.grad is not None
        return embedding.weight.grad

    wanted = gradient("reference", recompute=False)
    torch.testing.assert_close(gradient("torch", recompute=True), wanted, rtol=1e-5, atol=1e-7)


def test_weight_may_be_gone_by_backward() -> None:
    """ZeRO-3 gathers a parameter for the forward of its module and frees it afterwards."""
    case = make_case()
    wanted, case = fused(case, torch.float32), case.in_dtype(torch.float32)
    head = nn.Parameter(case.weight_VD.detach().clone())
    loss = replace(case, weight_VD=head).head().loss
    shape = head.shape
    head.data.fill_(float("nan"))
    head.data = torch.empty(0)
    gradients = torch.autograd.grad(loss, (case.hidden_TD, head))
    assert gradients[1].shape == shape
    assert torch.equal(gradients[0], wanted["hidden_TD"])
    assert torch.equal(gradients[1], wanted["weight_VD"])


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_a_loss_goes_backward_once(impl: str) -> None:
    """Its gradients are handed out, so that a second time would give wrong numbers."""
    loss = make_case(rows=12).in_dtype(torch.float32).head(impl=impl).loss
    (2 * loss).backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_lora_on_the_head_gets_its_gradients_through_the_dense_weight() -> None:
    case = make_case(0.5)
    low_VR = torch.randn(203, 3, generator=torch.Generator().manual_seed(1))
    low_RD = torch.randn(3, 19, generator=torch.Generator().manual_seed(2))
    gradients = []
    for impl in ("reference", "torch"):
        up_VR, down_RD = (x.clone().requires_grad_() for x in (low_VR, low_RD))
        dense_VD = case.weight_VD + 0.5 * up_VR @ down_RD
        replace(case, weight_VD=dense_VD).head(impl=impl).loss.backward()
        gradients.append((up_VR.grad, down_RD.grad))
    for ours, wanted in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-7)


def test_autocast_computes_in_its_dtype() -> None:
    case = make_case(bias=True).in_dtype(torch.float32)
    low = fused(case, torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = case.head()
    result.loss.backward()
    assert torch.equal(result.loss.detach(), low["loss"])
    assert case.weight_VD.grad is not None and case.weight_VD.grad.dtype == torch.float32
    assert torch.equal(case.weight_VD.grad, low["weight_VD"].float())
