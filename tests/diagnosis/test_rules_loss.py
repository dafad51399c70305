"""Rules over single losses: what must fire, and what must not."""

from __future__ import annotations

import dataclasses
import math
import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest

from posttrain_dist.diagnosis.alarms import Level
from posttrain_dist.diagnosis.facts import ModelFacts
from posttrain_dist.diagnosis.monitor import diagnose

made = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("made_histories.py"))))
training, with_evals, only = made.training, made.with_evals, made.only
falling, flat = made.falling, made.flat

SMALL = ModelFacts(parameters=2_400_000, vocab_size=2048)
SEVEN = ModelFacts(parameters=7_000_000_000, vocab_size=32_000)
SEVENTY = ModelFacts(parameters=70_000_000_000, vocab_size=32_000)


# ------------------------------------------------------------------------------ initial loss


@pytest.mark.parametrize(
    ("first", "facts", "level", "says"),
    [
        (10.4, SEVEN, Level.error, "case pretrained: that is near or above ln V = 10.4"),
        (7.6, SMALL, Level.error, "ln V = 7.62"),
        (14.0, SMALL, Level.error, "near or above"),
        (4.5, SEVEN, Level.warning, "7B parameters: about 2.0 is usual, 1 to 3 is expected"),
        (0.3, SEVEN, Level.info, "7B parameters: about 2.0"),
        (2.8, SEVENTY, Level.warning, "70B parameters: 1.0 to 2.0 is usual"),
        (3.0, dataclasses.replace(SMALL, random_weights=True), Level.warning, "case random head"),
        (11.0, dataclasses.replace(SMALL, random_weights=True), Level.warning, "case random head"),
    ],
)
def test_initial_loss_fires(first: float, facts: ModelFacts, level: Level, says: str) -> None:
    rows = with_evals(training(flat(1.5), 5), 100, eval__loss=flat(first))
    (alarm,) = diagnose(rows, facts=facts)
    assert (alarm.rule, alarm.step, alarm.level) == ("initial_loss", 0, level)
    assert says in alarm.message
    assert f"{first:.3g}" in alarm.message
    # Without held-out rows the first training row tells, which is the untrained model too.
    (trained,) = diagnose(training(flat(first), 5, noise=0), facts=facts)
    assert (trained.rule, trained.step, trained.level) == ("initial_loss", 1, level)


@pytest.mark.parametrize(
    ("first", "facts"),
    [
        (4.36, SMALL),  # the small base model on chat rows: it has no expectation but ln V
        (0.5, SMALL),
        (7.67, dataclasses.replace(SMALL, random_weights=True)),
        (2.0, SEVEN),
        (1.2, SEVEN),
        (2.9, SEVEN),
        (1.0, SEVENTY),
        (2.0, SEVENTY),
        (10.0, ModelFacts()),  # nothing known of the model
        (0.693, dataclasses.replace(SEVEN, token_loss=False)),  # ln 2: a preference objective
    ],
)
def test_initial_loss_is_silent(first: float, facts: ModelFacts) -> None:
    assert diagnose(training(flat(first), 5, noise=0), facts=facts) == []


def test_initial_loss_is_not_looked_for_late() -> None:
    rows = [row | {"step": row["step"] + 500} for row in training(flat(9.9), 5)]
    assert diagnose(rows, facts=SEVEN) == []


# ------------------------------------------------------------------------------ NaN and spikes


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("key", ["train/loss", "train/grad_norm", "channel_loss/a", "eval/loss"])
def test_not_finite_fires_once(key: str, value: float) -> None:
    rows = training(flat(2.0), 80)
    for row in rows[49:]:
        row[key] = value
    (alarm,) = diagnose(rows)
    assert (alarm.rule, alarm.step, alarm.level) == ("not_finite", 50, Level.error)
    assert key in alarm.message
    assert "before step 50" in alarm.fix


def test_not_finite_in_the_first_row_is_another_fault() -> None:
    (alarm,) = diagnose([{"step": 1, "train/loss": math.nan}])
    assert "before the first update" in alarm.message
    assert diagnose([{"step": 1, "train/loss": 1.5}]) == []


def test_spike_names_its_step_and_how_far_it_went() -> None:
    rows = training(falling(3.0, 2.0, 30), 200, noise=0.05)
    rows[119] |= {"train/loss": 6.0, "train/grad_norm": 40.0}
    (alarm,) = diagnose(rows)
    assert (alarm.rule, alarm.step) == ("spike", 120)
    assert "3.0 times its level of 2" in alarm.message
    assert "gradient norm 40" in alarm.message
    rows[121]["train/loss"] = 6.0  # the same episode
    rows[180]["train/loss"] = 6.0  # another
    assert [alarm.step for alarm in diagnose(rows)] == [120, 181]


def test_spike_is_silent() -> None:
    rows = training(falling(3.0, 2.0, 30), 200, noise=0.25)  # what the smallest batches give
    rows[119]["train/loss"] = 3.4
    assert diagnose(rows) == []
    early = training(flat(2.0), 15, noise=0.05)
    early[10]["train/loss"] = 9.0  # no level is known yet
    assert diagnose(early) == []
    downwards = training(flat(2.0), 100, noise=0.05)
    downwards[80]["train/loss"] = 0.1
    assert diagnose(downwards) == []


# ------------------------------------------------------------------------------ low loss


def test_low_loss_with_and_without_held_out_rows() -> None:
    rows = training(falling(2.0, 0.05, 15), 150, noise=0.1)
    (alarm,) = diagnose(rows)
    assert (alarm.rule, alarm.level) == ("low_loss", Level.warning)
    assert "memorised" in alarm.message
    high = with_evals(rows, 50, eval__loss=lambda s: {0: 2.0, 50: 1.4}.get(s, 1.41))
    (alarm,) = only("low_loss", diagnose(high))
    assert alarm.level is Level.warning
    assert "go back to the checkpoint at or before step 50 " in alarm.fix
    solved = with_evals(rows, 50, eval__loss=falling(2.0, 0.06, 15))
    (alarm,) = diagnose(solved)
    assert (alarm.rule, alarm.level) == ("low_loss", Level.info)


def test_low_loss_is_silent() -> None:
    assert diagnose(training(falling(2.0, 0.25, 15), 200, noise=0.05)) == []
    single = training(flat(1.0), 60)
    for row in single[40:44]:
        row["train/loss"] = 0.05  # a few easy batches
    assert diagnose(single) == []
    rewards = ModelFacts(token_loss=False)
    assert diagnose(training(falling(0.69, 0.05, 15), 150), facts=rewards) == []
