"""Memory that cannot be had, wherever a run is: torch itself raises it here, asked for too much."""

from __future__ import annotations

import pickle

import pytest
import torch

from posttrain_dist.checkpoint import store
from posttrain_dist.config import (
    CheckpointConfig,
    DataConfig,
    Hardware,
    ModelConfig,
    RunConfig,
    TrainConfig,
    complete,
)
from posttrain_dist.engine import AdamW
from posttrain_dist.engine.master import MasterAdamW
from posttrain_dist.engine.single import SingleEngine
from posttrain_dist.errors import (
    CheckpointError,
    ClusterError,
    OutOfMemory,
    TrainingError,
    error_fields,
    error_of,
    is_out_of_memory,
)
from posttrain_dist.metrics import LoggingConfig, WandbMode
from posttrain_dist.models.policy import Policy
from posttrain_dist.objectives.base import TokenLoss
from posttrain_dist.planner.fallbacks import choose
from posttrain_dist.planner.machine import find_machine
from posttrain_dist.planner.plan_file import write_plan
from posttrain_dist.prepare import prepare
from posttrain_dist.train import train

STEPS = 2


@pytest.fixture(scope="module")
def base(tiny_llama, rows_file) -> RunConfig:
    return complete(
        RunConfig(
            model=ModelConfig(path=str(tiny_llama)),
            data=DataConfig(train=str(rows_file), max_length=64),
            optimizer=AdamW(lr=1e-3),
            train=TrainConfig(steps=STEPS, batch_size=2, micro_batch_size=2, rehearse=True),
            checkpoint=CheckpointConfig(export=False),
            logging=LoggingConfig(wandb=WandbMode.off),
            hardware=Hardware(host_memory_gib=4.0),
        )
    )


@pytest.fixture(scope="module")
def prepared(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepared") / "prepared"
    prepare(base, folder)
    return folder


@pytest.fixture
def folder(base, prepared, tmp_path):
    """A run folder whose run was planned."""
    (tmp_path / "prepared").symlink_to(prepared)
    write_plan(tmp_path, choose(base, find_machine(base, plans_only=True)))
    return tmp_path


def too_much(*_, **__) -> torch.Tensor:
    """More than any machine has: the allocator's own error."""
    return torch.empty(1 << 50)


def fail_in(monkeypatch, owner, name, from_call=1):
    """Have a method of ours ask for too much memory, from the nth call on."""
    calls, whole = [0], getattr(owner, name)

    def failing(*arguments, **named):
        calls[0] += 1
        return (too_much if calls[0] >= from_call else whole)(*arguments, **named)

    monkeypatch.setattr(owner, name, failing)


class TooMuchBackward(torch.autograd.Function):
    """The identity, whose gradient asks for too much."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, _):
        return too_much()


def failing_backward(monkeypatch):
    whole = TokenLoss.loss

    def loss(self, hidden_ND, *arguments):
        return whole(self, TooMuchBackward.apply(hidden_ND), *arguments)

    monkeypatch.setattr(TokenLoss, "loss", loss)


WHERE = {
    "load": lambda patch: fail_in(patch, Policy, "__init__"),
    "forward and loss": lambda patch: fail_in(patch, TokenLoss, "loss", from_call=2),
    "backward": failing_backward,
    "optimizer step": lambda patch: fail_in(patch, MasterAdamW, "step"),
    "save": lambda patch: fail_in(patch, SingleEngine, "save_state"),
}


@pytest.mark.parametrize(
    "phase",
    [p if p in ("backward", "save") else pytest.param(p, marks=pytest.mark.slow) for p in WHERE],
)
def test_the_error_says_where_what_was_planned_and_what_fits(phase, base, folder, monkeypatch):
    WHERE[phase](monkeypatch)
    with pytest.raises(OutOfMemory) as failure:
        train(base, folder)
    error = failure.value
    assert error.where == ("before step 1" if phase == "load" else "the rehearsal")
    assert error.what.startswith(f"out of memory in the {phase}: 4,194,304.00 GiB more were asked")
    assert "most of it activations" in error.what or phase in ("load", "save", "optimizer step")
    # A planner's word that takes less than the run as it is.
    assert error.fix.startswith(
        "use train.micro_batch_size=1 model.activation_checkpointing=full ("
    )
    assert not (folder / "rehearsal").exists()
    assert type(pickle.loads(pickle.dumps(error))) is OutOfMemory
    assert str(error_of(error_fields(error, 0, ""))) == str(error)


def test_a_later_step_is_named(base, folder, monkeypatch):
    """The rehearsal takes two updates; the second one of the run is the fourth."""
    fail_in(monkeypatch, MasterAdamW, "step", from_call=4)
    with pytest.raises(OutOfMemory) as failure:
        train(base, folder)
    assert failure.value.where == "step 2"


def test_what_is_no_lack_of_memory_stays_what_it_is(base, folder, monkeypatch):
    def broken(*_):
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(MasterAdamW, "step", broken)
    with pytest.raises(RuntimeError, match="shapes"):
        train(base, folder)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (OSError(12, "Cannot allocate memory"), True),
        (OutOfMemory("gone"), True),
        (OSError(28, "No space left on device"), False),
        (RuntimeError("No space left on device"), False),
        (ClusterError("rank 0: out of memory"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_what_counts_as_a_lack_of_memory(error, expected):
    assert is_out_of_memory(error) is expected


def test_an_error_that_is_its_own_cause_is_looked_at_once():
    first, second = OSError(28, "No space left on device"), ValueError("of it")
    first.__cause__, second.__cause__ = second, first
    assert not is_out_of_memory(first)


def test_the_heaviest_loss_that_is_not_finite_ends_the_rehearsal(base, folder, monkeypatch):
    whole = TokenLoss.loss

    def loss(self, hidden_ND, head, batch, denominators):
        found = whole(self, hidden_ND, head, batch, denominators)
        return found._replace(total=found.total * (float("inf") if batch.num_tokens > 90 else 1.0))

    monkeypatch.setattr(TokenLoss, "loss", loss)
    with pytest.raises(TrainingError, match=r"heaviest batch \(samples") as failure:
        train(base, folder)
    assert failure.value.where == "step 0, the rehearsal"


def test_a_save_that_the_disk_refuses_ends_the_rehearsal(base, folder, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store, "write_atomic", full)
    with pytest.raises(CheckpointError, match="no space left") as failure:
        train(base, folder)
    assert "step 0 cannot be written" in str(failure.value)
    assert not (folder / "rehearsal").exists() and not (folder / "checkpoints").exists()
