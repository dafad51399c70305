"""Rules over held-out rows: made histories that must fire each, and ones that must not."""

from __future__ import annotations

import math
import runpy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from posttrain_dist.diagnosis import DiagnoseConfig
from posttrain_dist.diagnosis.monitor import diagnose

made = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("made_histories.py"))))
training, with_evals, only = made.training, made.with_evals, made.only
falling, flat, bowl = made.falling, made.flat, made.bowl


def test_overfitting_names_the_step_to_go_back_to() -> None:
    rows = with_evals(training(falling(2.0, 0.5, 150), 400), 50, eval__loss=bowl(150, 1.5, 0.002))
    (alarm,) = diagnose(rows)
    # Evaluations at 200, 250 and 300 lie above the one at 150.
    assert (alarm.rule, alarm.step, alarm.subject) == ("overfitting", 300, "")
    assert "1.5 at step 150" in alarm.message
    assert "go back to the checkpoint at or before step 150 " in alarm.fix
    assert "train.save_every" in alarm.fix  # whether there is one is not known here
    later = diagnose(rows, DiagnoseConfig(overfit_evals=5))
    assert [alarm.step for alarm in later] == [400]


def channels(train: dict[str, Callable], held: dict[str, Callable]) -> list[dict]:
    more = {f"channel_loss__{name}": value for name, value in train.items()}
    more |= {f"channel_share__{name}": flat(1 / len(train)) for name in train}
    rows = training(falling(2.0, 0.5, 150), 400, **more)
    evals = {f"eval_channel_loss__{name}": value for name, value in held.items()}
    return with_evals(rows, 50, eval__loss=falling(2.1, 1.0, 100), **evals)


def test_channel_overfitting_finds_the_one_channel() -> None:
    down = falling(2.0, 0.5, 150)
    rows = channels(
        {"code": down, "maths": down}, {"code": falling(2, 1, 100), "maths": bowl(100, 1.2, 0.001)}
    )
    (alarm,) = diagnose(rows)
    assert (alarm.rule, alarm.subject, alarm.step) == ("channel_overfitting", "maths", 250)
    assert "channel maths" in alarm.message
    assert "step 100" in alarm.fix


@pytest.mark.parametrize(
    ("train", "held"),
    [
        (falling(2.0, 0.5, 150), falling(2.1, 1.0, 100)),  # both fall
        (flat(1.0), bowl(100, 1.2, 0.001)),  # held-out rises, and nothing is memorised
        (falling(2.0, 0.5, 150), lambda s: 1.2 + 0.05 * ((s // 50) % 2)),  # to and fro
        (falling(2.0, 0.5, 150), lambda s: 1.2 + 1e-5 * s),  # a plateau
        (falling(2.0, 0.01, 40), lambda s: 0.02 + 2e-5 * s),  # a solved task
        (falling(2.0, 0.5, 150), lambda s: math.nan if s > 200 else 2 - 0.002 * s),
    ],
    ids=["both fall", "train flat", "jitter", "plateau", "solved", "NaN"],
)
def test_channel_overfitting_is_silent(train: Callable, held: Callable) -> None:
    down, good = falling(2.0, 0.5, 150), falling(2, 1, 100)
    rows = channels({"code": down, "maths": train}, {"code": good, "maths": held})
    assert [a.rule for a in diagnose(rows) if a.rule != "not_finite"] == []


def test_overfitting_needs_the_training_loss() -> None:
    rows = with_evals(training(falling(2.0, 0.5, 150), 400), 50, eval__loss=bowl(150, 1.5, 0.002))
    for row in rows:
        row.pop("train/loss", None)
    assert diagnose(rows) == []
