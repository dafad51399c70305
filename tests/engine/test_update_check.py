"""A trained tensor that stays, or a frozen one that moves, ends the run with its name."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from posttrain_dist.engine import AdamW
from posttrain_dist.engine.optimizers import ParameterRules
from posttrain_dist.engine.single import SingleEngine
from posttrain_dist.engine.update_check import UpdateCheck
from posttrain_dist.errors import TrainingError
from posttrain_dist.flow import StepInfo

ROWS = 40


class Small(nn.Module):
    """y = B A x + table[0]; what else is in it the loss does not see."""

    def __init__(self) -> None:
        super().__init__()
        random = torch.Generator().manual_seed(0)
        self.base = nn.Parameter(torch.randn(3000, 3, generator=random), requires_grad=False)
        self.a = nn.Parameter(torch.randn(4, 8, generator=random))
        self.b = nn.Parameter(torch.zeros(8, 4))
        self.table = nn.Parameter(torch.ones(ROWS, 8))
        self.apart = nn.Parameter(torch.ones(5, 5), requires_grad=False)

    def loss(self, seed: int) -> torch.Tensor:
        x = torch.randn(8, generator=torch.Generator().manual_seed(seed)).to(self.a.dtype)
        return (self.b @ self.a @ x + self.table[0] - x).square().sum()


class Run:
    """A model, its engine and the check, and steps of them."""

    def __init__(
        self,
        prepare: Callable[[Small], object] = lambda model: None,
        rules: ParameterRules | None = None,
        rate: Callable[[int], float] = lambda step: 1e-2,
        dtype: torch.dtype = torch.float32,
        **optimizer: float,
    ) -> None:
        self.model = Small().to(dtype)
        prepare(self.model)
        config, rules = AdamW(**optimizer), rules or ParameterRules()
        self.engine = SingleEngine(config, torch.device("cpu"), rules)
        self.engine.attach(self.model)
        self.rate = rate
        self.check = UpdateCheck(self.engine, self.model, config, rules, rate, 0)

    def steps(self, first: int, end: int, last: int = 0, factor: float = 1.0) -> None:
        for step in range(first, end + 1):
            (self.model.loss(step) * factor).backward()
            self.engine.step(self.rate(step))
            self.check(StepInfo(step, {"train/loss": 1.0}, last=step == last))

    @property
    def pending(self) -> set[str]:
        return set(self.check._pending)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [8, 32])
def test_a_training_that_moves_passes(dtype, bits):
    run = Run(dtype=dtype, weight_decay=0.1, state_bits=bits)
    run.steps(1, 1)
    assert run.pending == {"a", "b", "table"}
    run.steps(2, 3, last=3)
    assert not run.pending


def test_what_has_no_gradient_is_named():
    run = Run(lambda model: model.apart.requires_grad_(), weight_decay=0.5)
    run.steps(1, 1)  # A has none either, by B = 0
    with pytest.raises(TrainingError, match=r"^step 2: 1 of 4 trained .* gradient .*: apart\n"):
        run.steps(2, 2)


def test_rows_of_rare_tokens_may_wait():
    rules = ParameterRules(sparse=lambda name: name == "apart")
    run = Run(lambda model: model.apart.requires_grad_(), rules)
    run.steps(1, 9, last=9)
    assert run.pending == {"apart"}


def test_weight_decay_alone_is_no_update():
    """The optimizer sees a gradient, and its step is lost: the master only decays."""
    run = Run(weight_decay=0.3)
    names = [name for name, _ in run.engine._optimizer.named_state()]
    plain = run.engine._optimizer.step

    def step(lr):
        norm = plain(lr)
        with torch.no_grad():
            run.model.a.copy_(start * (1 - lr * 0.3) ** (step.calls + 1))
        step.calls += 1
        return norm

    step.calls, start = 0, run.model.a.detach().clone()
    run.engine._optimizer.step = step
    with pytest.raises(TrainingError, match=r"did not move in 2 updates, .* decay,: a\n"):
        run.steps(1, 2)
    assert names == ["a", "b", "table"]


def test_updates_below_the_last_place_are_waited_for():
    """A long warm-up: ones cannot move by 1e-9, and by 1e-5 they do."""
    run = Run(rate=lambda step: 1e-9 if step < 8 else 1e-5)
    run.steps(1, 7)
    assert "table" in run.pending and "b" not in run.pending  # zeros move by anything
    run.steps(8, 16)
    assert not run.pending
    lost = Run(rate=lambda step: 1e-9)
    lost.steps(1, 3, last=3)  # nothing is wrong with it
    assert "table" in lost.pending


def test_a_loss_that_is_still_zero_says_nothing():
    run = Run()
    run.steps(1, 2, factor=0.0)
    run.steps(3, 3, factor=0.0)
    run.steps(4, 4)  # A has no gradient yet, by B = 0
    assert run.pending == {"a"}
    run.steps(5, 8)
    assert not run.pending
    with pytest.raises(TrainingError, match="3 of 3 trained parameters had no gradient"):
        Run().steps(1, 3, last=3, factor=0.0)
    short = Run()
    short.steps(1, 1, last=1)  # A's first gradient is 0
    assert short.pending == {"a"}


def test_a_gradient_that_is_not_finite_is_named():
    run = Run(clip=0.0)
    run.steps(1, 1)
    with pytest.raises(TrainingError, match=r"not finite: a, b, table\n"):
        run.steps(2, 2, factor=float("nan"))


@pytest.mark.parametrize(
    "change",
    [
        lambda weight: weight[2999, 2].mul_(1 + 2**-23),  # one bit
        lambda weight: weight[:2].copy_(weight[:2].flip(0).clone()),  # two rows change places
        lambda weight: weight.copy_(weight.roll(1024)),
    ],
)
def test_a_frozen_weight_that_changes_is_named(change):
    run = Run()
    run.steps(1, 2)
    change(run.model.base.data)
    with pytest.raises(TrainingError, match=r"^step 3: 1 of 2 frozen parameters changed: base\n"):
        run.steps(3, 3)


def test_all_frozen_weights_are_compared_at_the_end():
    def more(model: Small) -> None:
        for i in range(30):
            model.register_parameter(f"f{i}", nn.Parameter(torch.ones(3), requires_grad=False))

    run = Run(more)
    run.steps(1, 2)
    run.model.f29.data[0] = 2
    with pytest.raises(TrainingError, match="1 of 32 frozen parameters changed: f29"):
        run.steps(3, 3, last=3)
