"""Rules over held-out rows, channels, special tokens: what must fire, what must not."""

from __future__ import annotations

import math
import random
import runpy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from posttrain_dist.diagnosis import DiagnoseConfig
from posttrain_dist.diagnosis.alarms import Level
from posttrain_dist.diagnosis.facts import ModelFacts
from posttrain_dist.diagnosis.monitor import diagnose

made = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("made_histories.py"))))
training, with_evals, only = made.training, made.with_evals, made.only
falling, flat, bowl = made.falling, made.flat, made.bowl


# ------------------------------------------------------------------------------ overfitting


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


# ------------------------------------------------------------------------------ shares


def shares(**parts: Callable[[int], float]) -> list[dict]:
    more = {f"channel_share__{name}": part for name, part in parts.items()}
    return training(falling(2.0, 1.0), 200, **more)


def test_starved_and_dominating_channel() -> None:
    found = diagnose(shares(big=flat(0.995), small=flat(0.005)))
    assert [(alarm.rule, alarm.subject) for alarm in found] == [
        ("starved_channel", "small"),
        ("dominating_channel", "big"),
    ]
    assert "0.50% of the weight" in found[0].message
    assert "99.5%" in found[1].message
    gone = shares(a=flat(0.5), b=lambda s: 0.5 if s < 50 else math.nan)
    for row in gone[49:]:
        row["channel_share/a"] = 1.0
        del row["channel_share/b"]  # a step without its tokens does not name the channel
    found = diagnose(gone)
    assert {(alarm.rule, alarm.subject) for alarm in found} == {
        ("starved_channel", "b"),
        ("dominating_channel", "a"),
    }
    assert all(75 <= alarm.step <= 80 for alarm in found)  # 30 rows, all or nearly all without b


def test_shares_against_their_targets() -> None:
    rows = shares(a=flat(0.7), b=flat(0.3))
    targets = ModelFacts(target_shares={1: {"a": 0.3, "b": 0.7}})
    found = diagnose(rows, facts=targets)
    assert [(alarm.rule, alarm.subject) for alarm in found] == [
        ("starved_channel", "b"),
        ("dominating_channel", "a"),
    ]
    assert "its target is 70.0%" in found[0].message
    assert diagnose(rows, facts=ModelFacts(target_shares={1: {"a": 0.6, "b": 0.4}})) == []
    few = shares(a=flat(0.5), b=flat(0.49), c=flat(0.01))
    (alarm,) = diagnose(few, facts=ModelFacts(target_shares={1: {"a": 0.5, "b": 0.45, "c": 0.05}}))
    assert (alarm.rule, alarm.subject) == ("starved_channel", "c")
    small = ModelFacts(target_shares={1: {"a": 0.995, "b": 0.005}})
    assert diagnose(shares(a=flat(0.995), b=flat(0.005)), facts=small) == []


def equal(count: int, less: int = 0) -> dict[str, Callable[[int], float]]:
    """Shares of `count` channels; the first `less` have a hundredth of an equal one."""
    return {f"c{i}": flat((0.01 if i < less else 1.0) / count) for i in range(count)}


def drawn(count: int, rows_per_step: int) -> list[dict]:
    """Each of 60 steps draws its rows from `count` channels of equal weight."""
    draw, rows = random.Random(0), training(falling(2.0, 1.0), 60)
    for row in rows:
        for name in draw.choices(range(count), k=rows_per_step):
            key = f"channel_share/c{name}"
            row[key] = row.get(key, 0) + 1 / rows_per_step
    return rows


def test_many_channels_of_equal_shares_are_not_starved() -> None:
    assert diagnose(shares(**equal(120))) == []
    assert diagnose(shares(**equal(500))[:60]) == []
    assert diagnose(drawn(120, 64)) == []
    # 30 steps are too few to say that one of 500 is drawn less often than the others.
    targets = ModelFacts(target_shares={1: {f"c{i}": 1 / 500 for i in range(500)}})
    assert diagnose(drawn(500, 16)) == []
    assert diagnose(drawn(500, 16), facts=targets) == []


def test_several_starved_channels_are_one_alarm() -> None:
    (alarm,) = diagnose(shares(**equal(120, less=20)))
    assert alarm.rule == "starved_channel"
    assert alarm.subject == "c0, c1, c2 and 17 more"
    assert "channel c0 has 0.01% of the weight" in alarm.message
    assert alarm.message.endswith("; 19 others like it")
    (alarm,) = diagnose(shares(**equal(120, less=4)))
    assert alarm.subject == "c0, c1, c2, c3"
    (alarm,) = diagnose(shares(**equal(120, less=1)))
    assert alarm.subject == "c0"
    assert "others" not in alarm.message


def test_an_episode_is_of_one_channel_also_where_several_are_one_alarm() -> None:
    def share(name: str) -> Callable[[int], float]:
        back = {"a": (), "b": range(50, 120)}[name]  # a stays starved, b recovers for a while
        return lambda step: 0.2 if step in back else 0.001

    rows = shares(a=share("a"), b=share("b"), c=flat(0.5), d=flat(0.3))
    found = [(alarm.step, alarm.subject) for alarm in diagnose(rows)]
    assert found == [(30, "a, b"), (149, "b")]


def test_shares_are_silent() -> None:
    assert diagnose(shares(alone=flat(1.0))) == []
    assert diagnose(shares(a=flat(0.85), b=flat(0.15))) == []
    assert diagnose(shares(a=flat(0.999), b=flat(0.001))[:29]) == []  # one window is not full
    rare = shares(a=flat(0.5), b=flat(0.5))
    for row in rare[::2]:
        row["channel_share/a"] = 1.0
        del row["channel_share/b"]  # in every other step only: 25 % of the weight
    assert diagnose(rare) == []


# ------------------------------------------------------------------------------ special tokens


def special(loss: Callable[[int], float], count: int = 200, every: int = 1) -> list[dict]:
    rows = training(
        falling(2.0, 1.0),
        count,
        special_token_loss__im_end=loss,
        special_token_accuracy__im_end=flat(0.25),
    )
    return [
        row
        if row["step"] % every == 0
        else {key: value for key, value in row.items() if "special" not in key}
        for row in rows
    ]


def test_special_tokens_fires() -> None:
    (alarm,) = diagnose(special(flat(3.0)))
    assert (alarm.rule, alarm.subject, alarm.step) == ("special_tokens", "im_end", 100)
    assert "the loss of im_end was 3 and is 3" in alarm.message
    assert "25%" in alarm.message
    (alarm,) = diagnose(special(lambda step: 1.0 + step / 100))
    assert alarm.subject == "im_end"


@pytest.mark.parametrize(
    "rows",
    [
        special(falling(3.0, 0.01)),
        special(flat(0.02)),  # the base model knows it already
        special(flat(3.0), count=99),
        special(flat(3.0), every=4),  # 50 rows have it
        special(falling(3.0, 2.0)),  # falls, slowly
    ],
    ids=["learned", "known", "early", "rare", "slow"],
)
def test_special_tokens_is_silent(rows: list[dict]) -> None:
    assert diagnose(rows) == []
