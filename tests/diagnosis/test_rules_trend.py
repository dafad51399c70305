"""Rules over the level of the loss: what must fire, and what must not."""

from __future__ import annotations

import random
import re
import runpy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from posttrain_dist.diagnosis.alarms import Level
from posttrain_dist.diagnosis.monitor import diagnose

made = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("made_histories.py"))))
training, with_evals, only = made.training, made.with_evals, made.only
falling, flat = made.falling, made.flat


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
        runs = [training(loss, 300, noise=noise, seed=seed) for seed in range(16)]
        return sum(bool(only("stall", diagnose(rows))) for rows in runs)

    # 0.2 nats in 300 steps, noise of 0.05 nats: 0.05 nats after 100, less than 5 %.
    assert stalled(lambda step: 1.5 - 0.2 * step / 300, 0.05 / 1.5) <= 1
    assert stalled(flat(1.5), 0.05 / 1.5) >= 15
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
