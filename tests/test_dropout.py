"""Dropout is another one in every step, and the same one again after a resume."""

from __future__ import annotations

import json

import pytest

from posttrain_dist.checkpoint import store
from posttrain_dist.config import DataConfig, Dtype, ModelConfig, RunConfig, TrainConfig, complete
from posttrain_dist.engine import AdamW
from posttrain_dist.metrics import LoggingConfig, WandbMode
from posttrain_dist.prepare import prepare
from posttrain_dist.train import train


def losses(folder) -> list[float]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row["train/loss"] for row in rows if row["step"]]


def run(tmp_path, builders, dropout: float):
    """Three steps on one row, with a rate that moves nothing: only dropout can differ."""
    rows = [builders.chat("copy the quick brown fox", "the quick brown fox", "copy")]
    config = complete(
        RunConfig(
            model=ModelConfig(path=str(builders.model(tmp_path / "m", attention_dropout=dropout))),
            data=DataConfig(
                train=str(builders.write(tmp_path / "rows.jsonl", rows)), eval_fraction=0.0
            ),
            optimizer=AdamW(lr=1e-12, warmup_ratio=0.0),
            train=TrainConfig(steps=3, batch_size=1, save_every=1, dtype=Dtype.float32),
            logging=LoggingConfig(wandb=WandbMode.off),
        )
    )
    folder = tmp_path / "run"
    prepare(config, folder / "prepared")
    train(config, folder)
    return config, folder


def test_the_mask_of_a_step_is_its_own_and_a_resumed_step_has_it_again(tmp_path, builders):
    config, folder = run(tmp_path, builders, dropout=0.5)
    whole = losses(folder)
    assert len({round(loss, 4) for loss in whole}) == 3, whole
    for path in store.whole_checkpoints(folder)[1:]:
        (path / store.MANIFEST).unlink()  # what a kill after the oldest leaves
    train(config, folder)
    assert losses(folder) == whole  # bit for bit


def test_without_dropout_the_steps_are_the_same(tmp_path, builders):
    _, folder = run(tmp_path, builders, dropout=0.0)
    first, *others = losses(folder)
    assert others == pytest.approx([first, first], rel=1e-6)
