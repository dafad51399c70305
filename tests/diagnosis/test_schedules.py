"""The rules where a schedule changes the mixture during the run, within one channel."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from posttrain_dist.diagnosis import DiagnoseConfig
from posttrain_dist.diagnosis.alarms import Alarm, Level
from posttrain_dist.diagnosis.facts import ModelFacts
from posttrain_dist.diagnosis.monitor import Diagnosis, diagnose

made = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("made_histories.py"))))
training, with_evals, only = made.training, made.with_evals, made.only
falling, flat, bowl = made.falling, made.flat, made.bowl

# The shares by channel are equal: the steps alone say that the mixture changes.
AT_300 = ModelFacts(target_shares={1: {"x": 1.0}, 300: {"x": 1.0}})


def found(rows: list[dict], facts: ModelFacts = AT_300) -> list[tuple[str, int]]:
    return [(alarm.rule, alarm.step) for alarm in diagnose(rows, facts=facts)]


def harder(step: int) -> float:
    return (0.7 if step < 300 else 1.5) - 0.0006 * step


@pytest.mark.parametrize("seed", range(5))
def test_a_curriculum_within_one_channel_is_no_rise_and_no_spike(seed: int) -> None:
    more = {"channel_loss__x": harder, "channel_share__x": flat(1.0)}
    rows = training(harder, 600, noise=0.05, seed=seed, **more)
    assert found(rows) == []
    blamed = {rule for rule, _ in found(rows, ModelFacts())}
    assert blamed == {"rising_loss", "spike"}  # nothing says that the mixture changed


def test_what_rises_within_a_mixture_is_still_found() -> None:
    rows = training(lambda s: harder(s) + 0.02 * max(0, s - 450), 600, noise=0.05)
    (alarm,) = diagnose(rows, facts=AT_300)
    assert (alarm.rule, alarm.level) == ("rising_loss", Level.error)
    assert 450 < alarm.step < 500
    spiked = training(harder, 600, noise=0.05)
    spiked[249]["train/loss"] = spiked[349]["train/loss"] = 9.0
    assert found(spiked) == [("spike", 250), ("spike", 350)]


def test_a_level_is_of_whole_blocks_of_one_mixture() -> None:
    # The mixture begins 10 rows into a block of 30.
    facts = ModelFacts(target_shares={1: {}, 281: {}})
    diagnosis = Diagnosis(DiagnoseConfig(), facts)
    levels = {}
    for row in training(lambda s: 1.0 if s < 281 else 3.0, 400, noise=0.0):
        diagnosis.observe(row)
        levels[row["step"]] = list(diagnosis.history.levels)
    assert levels[280] == [1.0] * 9
    assert levels[281] == levels[309] == []
    assert levels[310] == [3.0]
    assert levels[400] == [3.0] * 4


@pytest.mark.parametrize("first", [0, 1])
def test_a_mixture_from_the_first_step_on_changes_nothing(first: int) -> None:
    rows = training(falling(2.0, 0.5, 150), 400)
    rows = with_evals(rows, 50, eval__loss=lambda s: 1.5 + 0.002 * s)  # step 0 is the best
    facts = ModelFacts(target_shares={first: {"x": 1.0}})
    assert found(rows, facts) == found(rows, ModelFacts()) == [("overfitting", 150)]


def test_a_plateau_of_a_later_mixture_is_no_stall() -> None:
    learned = falling(2.0, 1.0)
    rows = training(lambda s: learned(s) if s < 300 else 1.3, 600, noise=0.02)
    assert found(rows) == []
    still = training(lambda s: 2.0 if s < 300 else 1.3, 600, noise=0.02)
    assert [rule for rule, _ in found(still)] == ["stall"]  # before the mixture changed


def test_held_out_rows_tell_of_a_stall_over_all_mixtures() -> None:
    many = ModelFacts(target_shares={step: {} for step in range(1, 400, 50)})
    rows = training(flat(2.0), 400, noise=0.02)
    assert [rule for rule, _ in found(with_evals(rows, 40, eval__loss=flat(2.1)), many)] == [
        "stall"
    ]
    # Learned under the first mixture, worse than that since.
    held = with_evals(rows, 40, eval__loss=lambda s: {0: 2.1, 40: 1.8}.get(s, 2.1))
    assert found(held, many) == []


def overfit(train: Callable[[int], float], held: Callable[[int], float]) -> list[Alarm]:
    rows = with_evals(training(train, 800, noise=0.05), 50, eval__loss=held)
    return only("overfitting", diagnose(rows, facts=AT_300))


def test_overfitting_compares_within_one_mixture() -> None:
    # From step 300 on the rows are easier and unlike those held out.
    def train(step: int) -> float:
        return falling(2.0, 1.2, 100)(step) if step < 300 else 0.6

    assert overfit(train, lambda s: 1.8 - 0.001 * s if s < 300 else 1.7) == []
    # Memorised under the second mixture: its own best is at 450.
    (alarm,) = overfit(
        lambda s: train(s) if s < 300 else 2 - 0.0015 * s,
        lambda s: 1.4 if s < 300 else bowl(450, 1.5, 0.002)(s),
    )
    assert alarm.step == 600
    assert "1.5 at step 450" in alarm.message


def test_low_loss_names_the_best_step_of_the_whole_run() -> None:
    rows = training(lambda s: 1.5 - 0.001 * s if s < 300 else 0.05, 500)
    held = with_evals(rows, 50, eval__loss=lambda s: 1.2 if s == 100 else 1.4)
    (alarm,) = only("low_loss", diagnose(held, facts=AT_300))
    assert alarm.step == 329  # 30 rows of the second mixture
    assert "before step 100 " in alarm.fix
