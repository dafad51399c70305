"""Rules over channels' shares and special tokens: what must fire, what must not."""

from __future__ import annotations

import math
import random
import runpy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from posttrain_dist.diagnosis.facts import ModelFacts
from posttrain_dist.diagnosis.monitor import diagnose

made = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("made_histories.py"))))
training, with_evals, only = made.training, made.with_evals, made.only
falling, flat, bowl = made.falling, made.flat, made.bowl


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
