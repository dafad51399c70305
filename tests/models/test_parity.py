"""The start-up comparison of the fused head with its reference: what it lets pass, and what not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from posttrain_kernels import linear_cross_entropy

from posttrain_dist.config import DataConfig, Dtype, ModelConfig, RunConfig, TrainConfig, complete
from posttrain_dist.data.packs.collate import collate, filler
from posttrain_dist.errors import ModelError
from posttrain_dist.flow import Batch, Example
from posttrain_dist.metrics import LoggingConfig, WandbMode
from posttrain_dist.models import parity
from posttrain_dist.objectives.sft import Sft
from posttrain_dist.prepare import prepare
from posttrain_dist.train import train


def batch_of(num_targets: int) -> Batch:
    weight_L = np.zeros(600, np.float32)
    weight_L[-num_targets:] = 0.5
    ids_L = np.random.default_rng(0).integers(0, 50, 600).astype(np.int32)
    return collate([Example(ids_L, weight_L, 0, 0)])


def check(function: Callable[..., Any], dtype: torch.dtype = torch.float32) -> dict[str, float]:
    random = torch.Generator().manual_seed(0)
    hidden_ND = torch.randn(40, 16, generator=random).to(dtype)
    weight_VD = torch.randn(97, 16, generator=random).to(dtype)
    labels_N = torch.randint(97, (40,), generator=random)
    found = parity.compare(function, hidden_ND, weight_VD, None, labels_N, denominator=40.0)
    return parity.check(found, dtype)


class Scale(torch.autograd.Function):
    """The same value, and a gradient that is off by a factor."""

    @staticmethod
    def forward(ctx, value, factor):
        ctx.factor = factor
        return value.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.factor, None


def wrong(place: str, factor: float) -> Callable[..., Any]:
    def function(hidden_ND, weight_VD, labels_N, **options):
        if options.get("impl") == "reference":
            return linear_cross_entropy(hidden_ND, weight_VD, labels_N, **options)
        if place == "grad_hidden":
            hidden_ND = Scale.apply(hidden_ND, factor)
        if place == "grad_weight":
            weight_VD = Scale.apply(weight_VD, factor)
        result = linear_cross_entropy(hidden_ND, weight_VD, labels_N, **options)
        if place == "loss":
            result = result._replace(loss=Scale.apply(result.loss, 1.0) * factor)
        if place == "nll":
            result.nll_N[7] *= factor
        return result

    return function


@pytest.mark.parametrize(("dtype", "factor"), [(torch.float32, 1.001), (torch.bfloat16, 1.3)])
@pytest.mark.parametrize("place", ["loss", "nll", "grad_hidden", "grad_weight"])
def test_each_part_is_compared(place: str, dtype: torch.dtype, factor: float) -> None:
    assert max(check(linear_cross_entropy, dtype).values()) <= parity.TOLERANCE[dtype]["loss"]
    with pytest.raises(ModelError, match=f"first batch: .*{place} by"):
        check(wrong(place, factor if place != "nll" else 1 + 3 * (factor - 1)), dtype)
    with pytest.raises(ModelError, match=f"{place} by nan"):
        check(wrong(place, float("nan")), dtype)


@pytest.mark.parametrize("num_targets", [1, 4, 64])
def test_what_eager_rounds_away_is_no_fault(
    num_targets: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Large logits and few targets, with products in bfloat16 as a GPU makes them."""
    monkeypatch.setattr("posttrain_kernels.passes.matmuls.multiplies_fast", lambda _: True)
    usual = []
    for seed in range(20):
        random = torch.Generator().manual_seed(seed)
        labels_N = torch.randint(97, (num_targets,), generator=random)
        weight_VD = torch.randn(97, 64, generator=random) / 8
        hidden_ND = 27 * weight_VD[labels_N] + 3 * torch.randn(num_targets, 64, generator=random)
        tensors = (hidden_ND.bfloat16(), weight_VD.bfloat16(), None, labels_N)
        found = parity.compare(linear_cross_entropy, *tensors, denominator=float(num_targets))
        parity.check(found, torch.bfloat16)
        usual.append(float(found.eager.loss))
    if num_targets <= 4:  # that the case is a hard one
        assert max(usual) > parity.TOLERANCE[torch.bfloat16]["loss"]


@pytest.mark.parametrize("num_targets", [1, 4, 64])
@pytest.mark.parametrize("gain", [11, 14, 16])
def test_a_loss_near_zero_is_as_exact_as_its_logits(num_targets: int, gain: int) -> None:
    """Of memorised tokens the loss is a small difference of large logits."""
    apart = []
    for seed in range(20):
        random = torch.Generator().manual_seed(seed)
        labels_N = torch.randint(97, (num_targets,), generator=random)
        weight_VD = torch.randn(97, 64, generator=random) / 8
        hidden_ND = gain * weight_VD[labels_N] + torch.randn(num_targets, 64, generator=random) / 2
        tensors = (hidden_ND, weight_VD, None, labels_N)
        found = parity.compare(linear_cross_entropy, *tensors, denominator=float(num_targets))
        parity.check(found, torch.float32)
        apart.append(float(found.fused.loss))
        if num_targets == 64:  # losses of 0.03, 0.006 and 0.003: 1 % of them is no rounding
            for place in ("loss", "grad_hidden", "grad_weight"):
                function = wrong(place, 1.01)
                found = parity.compare(function, *tensors, denominator=float(num_targets))
                with pytest.raises(ModelError, match=f"{place} by"):
                    parity.check(found, torch.float32)
    if gain == 16:  # that the case is a hard one
        assert max(apart) > 3 * parity.TOLERANCE[torch.float32]["loss"]


def test_a_reference_too_large_for_the_device_runs_on_the_host() -> None:
    full = []

    def function(*tensors, **options):
        if options.get("impl") == "reference" and not full:
            full.append(True)
            raise torch.OutOfMemoryError("no room")
        return linear_cross_entropy(*tensors, **options)

    assert check(function)["grad_weight"] <= 1e-6 and full
    full.clear()
    with pytest.raises(ModelError, match="grad_weight"):
        check(
            lambda *t, **o: (
                wrong("grad_weight", 2.0)(*t, **o) if "impl" not in o else function(*t, **o)
            )
        )


def test_real_targets_are_taken_and_at_most_256() -> None:
    for num_targets in (1, 3, 255, 500):
        places = parity.some_targets(batch_of(num_targets)).tolist()
        assert len(set(places)) == len(places) == min(num_targets, 256)
        assert places[0] == 0 and places[-1] == num_targets - 1
    assert parity.some_targets(filler(Sft())).tolist() == []


def test_a_run_says_it_and_a_wrong_kernel_trains_nothing(
    tmp_path: Path, tiny_llama: Path, rows_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = complete(
        RunConfig(
            model=ModelConfig(path=str(tiny_llama)),
            data=DataConfig(train=str(rows_file), max_length=64),
            train=TrainConfig(steps=1, dtype=Dtype.float32),
            logging=LoggingConfig(wandb=WandbMode.off),
        )
    )
    for name in ("right", "wrong"):
        prepare(config, tmp_path / name / "prepared")
    train(config, tmp_path / "right")
    log = (tmp_path / "right" / "logs" / "rank-0.log").read_text()
    assert "the fused head differs from the reference on the first batch by: loss " in log
    monkeypatch.setattr("posttrain_dist.build.linear_cross_entropy", wrong("grad_weight", 1.01))
    with pytest.raises(ModelError, match="nothing was trained"):
        train(replace(config), tmp_path / "wrong")
    assert not (tmp_path / "wrong" / "metrics.jsonl").exists()


def test_a_frozen_head_is_compared_without_the_gradient_of_its_weight() -> None:
    asked: list[bool] = []

    random = torch.Generator().manual_seed(0)
    hidden_ND, weight_VD = torch.randn(40, 16, generator=random), torch.randn(97, 16)
    labels_N = torch.randint(97, (40,), generator=random)
    for factor in (1.0, float("nan")):

        def function(hidden_ND, weight_VD, labels_N, factor=factor, **options):
            asked.append(weight_VD.requires_grad)
            hidden_ND = Scale.apply(hidden_ND, factor)
            return linear_cross_entropy(hidden_ND, weight_VD, labels_N, **options)

        found = parity.compare(
            function, hidden_ND, weight_VD, None, labels_N, denominator=40.0, trained=False
        )
        assert float(found.fused.grad_weight) == 0
        assert torch.isnan(found.fused.grad_hidden) == (factor != 1)
    assert asked == [False] * 4
