"""Rules over the loss: made histories that must fire each, and ones that must not."""

from __future__ import annotations

import dataclasses
import math
import random
import re
import runpy
from collections.abc import Callable
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


# ------------------------------------------------------------------------------ rising, stalling


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    "loss",
    [
        lambda step: 2.0 if step < 100 else 2.0 + 0.02 * (step - 100),  # drifts away
        lambda step: 2.0 if step < 100 else 5.0,  # diverges at once and stays there
        lambda step: 1.0 + 0.03 * step,  # from the first step on
    ],
)
def test_rising_loss_fires(loss: Callable[[int], float], seed: int) -> None:
    found = only("rising_loss", diagnose(training(loss, 250, seed=seed)))
    assert found
    assert found[0].level is Level.error
    last_low = int(re.search(r"up to step (\d+)", found[0].message)[1])  # type: ignore[index]
    assert last_low <= 120  # the step to go back to lies before the rise
    assert f"go back to the checkpoint at or before step {last_low} " in found[0].fix


@pytest.mark.parametrize("seed", range(5))
def test_hard_or_noisy_data_does_not_rise(seed: int) -> None:
    assert diagnose(training(flat(2.0), 800, noise=0.3, seed=seed)) == []
    recovered = training(lambda s: 3.5 if 100 < s < 115 else 2.0, 300, noise=0.1, seed=seed)
    assert only("rising_loss", diagnose(recovered)) == []


def mixed(step_loss: Callable[[str, int], float], share: Callable[[int], float]) -> list[dict]:
    """Two channels; `share` is that of the hard one."""
    draw, rows = random.Random(3), []
    for step in range(1, 301):
        part = share(step)
        losses = {
            name: step_loss(name, step) * (1 + 0.05 * draw.gauss(0, 1)) for name in ("easy", "hard")
        }
        row = {"step": step, "train/loss": part * losses["hard"] + (1 - part) * losses["easy"]}
        row |= {f"channel_loss/{name}": value for name, value in losses.items()}
        row |= {"channel_share/hard": part, "channel_share/easy": 1 - part}
        rows.append(row)
    return rows


def test_a_curriculum_that_turns_to_hard_rows_is_no_rising_loss() -> None:
    levels = {"easy": 1.0, "hard": 3.0}
    curriculum = mixed(lambda name, step: levels[name], lambda step: 0.1 if step < 150 else 0.8)
    assert only("rising_loss", diagnose(curriculum)) == []
    # The same mix, and both channels do get worse.
    worse = mixed(lambda name, step: levels[name] * (1 + step / 200), lambda step: 0.3)
    assert only("rising_loss", diagnose(worse))


def test_stall_fires_after_warm_up() -> None:
    (alarm,) = diagnose(training(flat(2.0), 200, noise=0.03))
    assert (alarm.rule, alarm.level) == ("stall", Level.warning)
    # The warm-up doubles the rate for the last time at step 10 or 11 of 20.
    assert 110 <= alarm.step <= 125
    assert "2" in alarm.message
    noisy = with_evals(training(flat(2.0), 200, noise=0.3), 50, eval__loss=flat(2.1))
    (alarm,) = diagnose(noisy)  # held-out rows are the same each time, and have no noise
    assert alarm.rule == "stall"
    assert "held-out loss was 2.1" in alarm.message


def test_stall_says_that_nothing_is_trained() -> None:
    rows = training(flat(2.0), 20, train__grad_norm=flat(0.0))
    (alarm,) = diagnose(rows)
    assert (alarm.rule, alarm.step, alarm.level) == ("stall", 5, Level.error)
    assert "gradient norm was 0" in alarm.message
    no_rate = training(flat(2.0), 150, noise=0.03, train__lr=flat(0.0))
    assert "learning rate is 0" in diagnose(no_rate)[0].message


def test_a_slow_and_steady_fall_is_no_stall() -> None:
    def stalled(loss: Callable[[int], float], noise: float) -> int:
        runs = [training(loss, 300, noise=noise, seed=seed) for seed in range(40)]
        return sum(bool(only("stall", diagnose(rows))) for rows in runs)

    # 0.2 nats in 300 steps, noise of 0.05 nats: 0.05 nats after 100, less than 5 %.
    assert stalled(lambda step: 1.5 - 0.2 * step / 300, 0.05 / 1.5) <= 2
    assert stalled(flat(1.5), 0.05 / 1.5) >= 38
    (alarm,) = diagnose(training(lambda step: 1.5 - 1e-5 * step, 200, noise=0.02))
    assert "and is 1.5" in alarm.message
    assert "come no lower" not in alarm.message  # a median is no lowest value


@pytest.mark.parametrize(
    "rows",
    [
        training(flat(2.0), 90, noise=0.02),  # too early to say
        training(flat(2.0), 200, noise=0.3),  # too noisy to say
        training(falling(2.0, 1.7), 400, noise=0.02),  # learned, then a plateau
        training(falling(2.0, 1.7, 5), 400, noise=0.05),  # ... in the very first steps
        training(flat(2.0), 400, noise=0.02, train__lr=lambda s: 1e-6 * s),  # warm-up throughout
        with_evals(training(flat(2.0), 300, noise=0.3), 50, eval__loss=falling(2.1, 1.9)),
    ],
    ids=["early", "noisy", "plateau", "at once", "warm-up", "held-out falls"],
)
def test_stall_is_silent(rows: list[dict]) -> None:
    if rows[-1].get("train/lr", 0) > 1.5e-4:  # half of the last rate was reached 200 rows ago
        rows = rows[:180]
    assert diagnose(rows) == []
