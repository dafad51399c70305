"""The optimizer of one process, against torch's own clipping and AdamW step by step."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from posttrain_dist.engine import AdamW
from posttrain_dist.engine import master as module
from posttrain_dist.engine.master import MasterAdamW


def make(dtype: torch.dtype) -> nn.ParameterDict:
    random = torch.Generator().manual_seed(0)
    shapes = {"matrix": (7, 5), "bias": (5,), "other": (3, 3), "unused": (2,)}
    return nn.ParameterDict(
        {n: nn.Parameter(torch.randn(s, generator=random).to(dtype)) for n, s in shapes.items()}
    )


def losses(parameters: nn.ParameterDict, seed: int) -> list[torch.Tensor]:
    """Two micro-batches; `other` is in the first alone."""
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(4, 7, generator=random).to(parameters["matrix"].dtype)
    y = x @ parameters["matrix"] + parameters["bias"]
    return [parameters["other"].square().sum() + y.square().mean(), y.pow(3).mean()]


@pytest.mark.parametrize("clip", [0.0, 0.5, 1e6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bucket", [1 << 26, 40])
def test_equals_clip_grad_norm_and_adamw_in_float32(
    clip: float, dtype: torch.dtype, bucket: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BUCKET_ELEMENTS", bucket)
    config = AdamW(lr=0.1, weight_decay=0.2, clip=clip)
    ours, plain = make(dtype), make(dtype)
    masters = {n: nn.Parameter(p.detach().float()) for n, p in plain.items()}
    groups = [
        {"params": [masters["matrix"], masters["other"]], "weight_decay": 0.2},
        {"params": [masters["bias"], masters["unused"]], "weight_decay": 0.0},
    ]
    reference = torch.optim.AdamW(groups, betas=(config.beta1, config.beta2), foreach=False)
    optimizer = MasterAdamW(ours.items(), config)
    for step in range(4):
        lr = 0.1 / (step + 1)
        for number, loss in enumerate(losses(ours, step)):
            optimizer.before_backward(last=number == 1)
            loss.backward(retain_graph=True)
        norm = optimizer.step(lr)
        sum(losses(plain, step)).backward()
        for name, parameter in plain.items():
            masters[name].grad = None if parameter.grad is None else parameter.grad.float()
            parameter.grad = None
        wanted = nn.utils.clip_grad_norm_(masters.values(), clip or float("inf"))
        for group in reference.param_groups:
            group["lr"] = lr
        reference.step()
        with torch.no_grad():
            for name, parameter in plain.items():
                parameter.copy_(masters[name])
        # In bfloat16 the two micro-batches are added in another order.
        close = (
            {"rtol": 2e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 0.02, "atol": 0.02}
        )
        torch.testing.assert_close(norm, wanted, **close)
        for name, parameter in ours.items():
            torch.testing.assert_close(parameter, plain[name], **close)
            assert parameter.grad is None


@pytest.mark.parametrize("norm", [1e-4, 0.4, 1.0, 2.5, 40.0])
def test_clipping_shrinks_large_gradients_and_leaves_small_ones_alone(norm: float) -> None:
    """Adam's moments show the gradient it saw: its first step has exp_avg = (1 - beta1) * g."""
    limit = 1.0
    parameter = nn.Parameter(torch.zeros(2))
    parameter.grad = torch.tensor([0.6, 0.8]) * norm
    config = AdamW(clip=limit)
    optimizer = MasterAdamW([("w", parameter)], config)
    assert float(optimizer.step(0.1)) == pytest.approx(norm, rel=1e-6)  # before clipping
    (state,) = optimizer.state()
    seen = state["exp_avg"] / (1 - config.beta1)
    wanted = torch.tensor([0.6, 0.8]) * min(norm, limit)
    torch.testing.assert_close(seen, wanted, rtol=5e-6, atol=0)


def test_weights_of_16_bits_move_by_less_than_their_last_place() -> None:
    """A master in float32 adds up steps that bfloat16 alone would round away."""
    parameter = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    optimizer = MasterAdamW([("w", parameter)], AdamW(clip=0.0))
    for _ in range(64):
        parameter.sum().backward()
        optimizer.step(1e-4)  # Adam's step is the rate; bfloat16 below 1 is spaced 1 / 256
    assert torch.equal(parameter.detach(), torch.full((3,), 1 - 64e-4).bfloat16())


def test_state_goes_on_where_it_was() -> None:
    ours, other = make(torch.bfloat16), make(torch.bfloat16)
    first, second = (MasterAdamW(p.items(), AdamW(lr=0.1)) for p in (ours, other))
    sum(losses(ours, 0)).backward()
    first.step(0.1)
    with torch.no_grad():
        for name, parameter in other.items():
            parameter.copy_(ours[name])
    second.load_state(copy.deepcopy(first.state()))  # as from a file
    for optimizer, parameters in ((first, ours), (second, other)):
        sum(losses(parameters, 1)).backward()
        optimizer.step(0.1)
    for name, parameter in ours.items():
        assert torch.equal(parameter, other[name])


@pytest.mark.parametrize("size", [1023, 1024, 3_000_001])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_norm_of_many_numbers_is_exact(size: int, dtype: torch.dtype) -> None:
    parameter = nn.Parameter(torch.ones(size, dtype=dtype))
    gradient = torch.randn(size, generator=torch.Generator().manual_seed(0)).to(dtype)
    parameter.grad = gradient.clone()
    norm = MasterAdamW([("w", parameter)], AdamW()).step(0.1)
    assert float(norm) == pytest.approx(float(gradient.double().norm()), rel=2e-7)


def test_a_norm_that_is_not_finite_is_told() -> None:
    parameter = nn.Parameter(torch.ones(2))
    optimizer = MasterAdamW([("w", parameter)], AdamW())
    (parameter * float("nan")).sum().backward()
    assert optimizer.step(0.1).isnan()
