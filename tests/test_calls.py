"""How many calls lie between a command and the loss: few, so that a newcomer can follow them."""

from __future__ import annotations

import traceback
from pathlib import Path

import pytest

from posttrain_dist.config import AdamW, DataConfig, ModelConfig, RunConfig, TrainConfig
from posttrain_dist.objectives.base import TokenLoss
from posttrain_dist.prepare import prepare
from posttrain_dist.train import train

PACKAGES = ("posttrain_dist", "posttrain_launch", "posttrain_kernels")


@pytest.fixture
def stack(monkeypatch) -> list[str]:
    """Frames of our own files at the first loss of a training step, outermost first."""
    found: list[str] = []
    loss = TokenLoss.loss

    def recording(self, hidden_ND, *arguments):
        frames = traceback.extract_stack()
        ours = [f for f in frames if any(name in Path(f.filename).parts for name in PACKAGES)]
        names = [f"{Path(f.filename).stem}.{f.name}" for f in ours]
        if not found and "loop.fit" in names:  # not the checks before the first step
            found.extend(names)
        return loss(self, hidden_ND, *arguments)

    monkeypatch.setattr(TokenLoss, "loss", recording)
    return found


def test_from_train_to_the_loss(stack, tiny_llama, rows_file, tmp_path):
    config = RunConfig(
        model=ModelConfig(path=str(tiny_llama)),
        data=DataConfig(train=str(rows_file), eval_fraction=0.0, max_length=64),
        optimizer=AdamW(lr=1e-3),
        train=TrainConfig(steps=1, batch_size=1),
    )
    prepare(config, tmp_path / "prepared")
    train(config, tmp_path)
    assert stack[0] == "train.train"
    assert stack[-1] == "policy.forward", "the frame that calls the loss"
    # Each frame but the first is a call, and the loss itself is one more.
    assert len(stack) <= 5, stack


def test_from_the_command_to_the_loss(stack, tiny_llama, rows_file, tmp_path, monkeypatch):
    from posttrain_launch.cli import main

    monkeypatch.chdir(tmp_path)
    words = [f"model.path={tiny_llama}", f"data.train={rows_file}", "data.eval_fraction=0"]
    code = main(["train", *words, "train.steps=1", "train.batch_size=1", "checkpoint.export=false"])
    assert code == 0
    assert stack[0] == "cli.main"
    assert len(stack) <= 10, stack
