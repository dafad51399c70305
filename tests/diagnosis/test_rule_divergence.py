"""A loss that is lost for good is told of few rows, and nothing else is taken for it."""

from __future__ import annotations

import dataclasses
import random
import runpy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from posttrain_dist.config import DataConfig, Dtype, ModelConfig, RunConfig, TrainConfig, complete
from posttrain_dist.diagnosis import DiagnoseConfig
from posttrain_dist.diagnosis.alarms import Level, read_alarms
from posttrain_dist.diagnosis.facts import ModelFacts
from posttrain_dist.diagnosis.monitor import Diagnosis, diagnose
from posttrain_dist.diagnosis.rule_table import diagnose_problems
from posttrain_dist.engine import AdamW
from posttrain_dist.metrics import LoggingConfig, WandbMode
from posttrain_dist.prepare import prepare
from posttrain_dist.train import train

made = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("made_histories.py"))))
training, only, falling = made.training, made.only, made.falling

SMALL = ModelFacts(parameters=2_400_000, vocab_size=2048)  # ln V = 7.6
SEVEN = ModelFacts(parameters=7_000_000_000, vocab_size=32_000)  # 10.4


def rows_of(*losses):
    return [{"step": i + 1, "train/loss": loss} for i, loss in enumerate(losses)]


@pytest.mark.parametrize(
    ("rows", "facts", "step"),
    [
        (rows_of(4.0, 244.0, 28.0), SMALL, 2),
        (rows_of(4.0, 16.0, 28.0, 29.0), SMALL, 3),  # 16 alone is 2.1 times ln V
        (rows_of(1.5, *[22.0] * 4), SEVEN, 3),
        (
            [{"step": 0, "eval/loss": 2.0}, {"step": 1, "train/loss": 2.0, "eval/loss": 50.0}],
            SEVEN,
            1,
        ),
        ([*rows_of(2.0), {"step": 2, "train/loss": 25.0, "eval/loss": 24.0}], SEVEN, 2),
        (rows_of(1.5, 1.4, 1.6, 3.5, 4.0, 5.0, 6.0, 6.0), SEVEN, 8),  # not yet a random guess
        (training(lambda s: 2.0 if s < 5 else 6.0, 25, noise=0.05), SEVEN, 9),
    ],
)
def test_divergence_fires(rows, facts, step):
    (alarm,) = only("divergence", diagnose(rows, facts=facts))
    assert (alarm.step, alarm.level) == (step, Level.error)
    assert "began at" in alarm.message and "optimizer.lr 10 times lower" in alarm.fix


@pytest.mark.parametrize(
    ("rows", "facts"),
    [
        (rows_of(4.0, 16.0, 4.1, 16.0, 4.0), SMALL),  # broken rows, and the model is as it was
        (rows_of(14.0, 25.0, 27.0, 20.0), SMALL),  # it began as badly
        (rows_of(1.5, 20.0, 20.0, 20.0, 20.0), SEVEN),  # 1.9 times: told, but by the 8th row
        (rows_of(1.0, 3.0, 1.0, 3.0, 1.0, 3.0, 1.0, 3.0, 1.0), SEVEN),
        (rows_of(0.7, 9.0, 9.0), replace(SEVEN, token_loss=False)),
        (rows_of(1.5, 40.0, 40.0), ModelFacts()),
        ([{"step": 0, "eval/loss": 60.0}], replace(SEVEN, random_weights=True)),
    ],
)
def test_divergence_is_silent(rows, facts):
    assert only("divergence", diagnose(rows, facts=facts)) == []


def test_healthy_short_runs_are_silent():
    draw = random.Random(5)
    for seed in range(80):
        start = draw.uniform(0.5, 4)
        loss = falling(start, start * draw.uniform(0.1, 1), draw.uniform(3, 60))
        rows = training(loss, draw.randint(2, 60), noise=draw.uniform(0.05, 0.35), seed=seed)
        assert only("divergence", diagnose(rows, facts=SEVEN)) == [], seed
    for turn in range(3, 40):  # from easy rows to hard ones, as a schedule asks
        facts = dataclasses.replace(SEVEN, target_shares={0: {"a": 1.0}, turn: {"b": 1.0}})
        rows = training(lambda s, turn=turn: 0.7 if s < turn else 3.0, 50)
        assert only("divergence", diagnose(rows, facts=facts)) == [], turn


def test_a_run_that_goes_on_from_another_is_judged_by_a_random_guess_alone():
    diagnosis = Diagnosis(DiagnoseConfig(), SEVEN)
    diagnosis.resume([])
    rows = [{"step": 100 + i, "train/loss": loss} for i, loss in enumerate([2.0, *[5.0] * 20])]
    assert [a for row in rows for a in diagnosis.observe(row)] == []
    (alarm,) = only("divergence", diagnosis.observe({"step": 200, "train/loss": 99.0}))
    assert "of a random guess is 10.4" in alarm.message
    assert diagnose_problems(DiagnoseConfig(early_stop=["divergence"])) == []


@pytest.mark.parametrize("dtype", [Dtype.float32, Dtype.bfloat16])
def test_a_learning_rate_of_one_is_told_within_four_steps(dtype, tiny_llama, rows_file, tmp_path):
    config = complete(
        RunConfig(
            model=ModelConfig(path=str(tiny_llama)),
            data=DataConfig(train=str(rows_file), max_length=64),
            optimizer=AdamW(lr=1.0, warmup_ratio=0.0),
            train=TrainConfig(steps=4, batch_size=2, dtype=dtype),
            logging=LoggingConfig(wandb=WandbMode.off),
        )
    )
    prepare(config, tmp_path / "prepared")
    train(config, tmp_path)
    alarms = read_alarms(tmp_path / "logs" / "alarms.jsonl")
    assert "divergence" in {alarm["rule"] for alarm in alarms}, alarms
