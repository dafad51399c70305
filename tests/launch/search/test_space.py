"""Hydra's override syntax as a space: kinds, bounds and texts; what cannot be searched."""

from __future__ import annotations

import json
import math

import pytest
from posttrain_launch.sweep.search.options import checked_options
from posttrain_launch.sweep.search.space import Dimension, Space, read_space

from posttrain_dist.errors import ConfigError, SeveralErrors


def dimension(word: str) -> Dimension:
    [found] = read_space([word]).dimensions
    return found


@pytest.mark.parametrize(
    ("word", "kind", "low", "high", "step", "log", "size"),
    [
        ("optimizer.lr=tag(log, interval(1e-5,1e-3))", "float", 1e-5, 1e-3, None, True, math.inf),
        ("tuning.dropout=interval(0,1)", "float", 0, 1, None, False, math.inf),
        ("tuning.rank=interval(4,64)", "int", 4, 64, None, False, 61),
        ("tuning.rank=tag(log,interval(4,64))", "int", 4, 64, None, True, 61),
        ("tuning.rank=range(8,65,step=8)", "int", 8, 64, 8, False, 8),
        ("tuning.rank=range(64,7,step=-8)", "int", 8, 64, 8, False, 8),
        ("tuning.dropout=range(0.0,0.2,step=0.05)", "float", 0, 0.15, 0.05, False, 4),
    ],
)
def test_ranges_are_read_with_their_bounds(word, kind, low, high, step, log, size):
    found = dimension(word)
    assert (found.kind, found.step, found.log, found.size) == (kind, step, log, size)
    assert (found.low, found.high) == pytest.approx((low, high), rel=1e-12)


def test_choices_are_one_of_a_list_of_texts():
    assert dimension("tuning.rank=8,16,32,8").values == ("8", "16", "32")
    assert dimension("tuning=choice(lora,full)").values == ("lora", "full")
    assert dimension("tuning.targets=all-linear,[q_proj,v_proj]").values[1] == "[q_proj,v_proj]"
    space = read_space(["seed=1", "tuning.rank=8,16", "tuning.alpha=2*tuning.rank", "seed=2"])
    assert space.overrides({"tuning.rank": "16"}) == (
        "tuning.rank=16",
        "tuning.alpha=2*tuning.rank",
        "seed=2",
    )
    assert space.size == 2


def test_values_of_a_finite_one_and_their_texts():
    found = dimension("tuning.dropout=range(0.0,0.2,step=0.05)")
    assert [found.override(value) for value in found.all_values()] == [
        "tuning.dropout=0",
        "tuning.dropout=0.05",
        "tuning.dropout=0.1",
        "tuning.dropout=0.15",
    ]
    assert dimension("tuning.rank=range(2,7,step=2)").all_values() == [2, 4, 6]


def test_a_text_never_leaves_the_bounds():
    found = dimension("optimizer.lr=interval(0.1234574,0.1999997)")
    assert found.override(0.1234574) == "optimizer.lr=0.1234574"  # 0.123457 lies below
    assert found.override(0.1234576) == "optimizer.lr=0.123458"
    assert found.override(0.19999949) == "optimizer.lr=0.199999"
    assert found.override(0.1999997) == "optimizer.lr=0.1999997"  # 0.2 lies above


def test_a_space_is_the_same_out_of_json():
    space = read_space(["a=1,2", "b=tag(log, interval(1,2))", "c=3", "d=range(0,9,3)"])
    again = Space.from_plain(json.loads(json.dumps(space.to_plain())))
    assert again == space


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("optimizer.lr=interval(1e-3,1e-5)", "is empty"),
        ("optimizer.lr=tag(log,interval(0,1))", "no logarithm"),
        ("optimizer.lr=tag(log,choice(1e-5,1e-3))", "which only an interval can be"),
        ("optimizer.lr=tag(quick,interval(0,1))", "has the tag quick"),
        ("tuning.rank=interval(4.5,8)", "takes whole numbers"),
        ("tuning.rank=range(8,9)", "one value is in the range"),
        ("tuning.rank=range(8,8)", "no value is in the range"),
    ],
)
def test_a_range_that_cannot_be_searched_names_its_key(word, says):
    with pytest.raises(ConfigError, match=says) as caught:
        read_space([word, "seed=1"])
    assert caught.value.where == word.partition("=")[0]
    assert caught.value.fix


def test_all_faults_come_at_once_and_none_is_a_fault_too():
    with pytest.raises(SeveralErrors) as caught:
        read_space(["optimizer.lr=interval(2,1)", "tuning.rank=range(8,9)"])
    assert [p.where for p in caught.value.problems] == ["optimizer.lr", "tuning.rank"]
    with pytest.raises(ConfigError, match="has nothing to search"):
        read_space(["seed=1"])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("sampler", "gp"),
        ("pruner", "hyperband"),
        ("direction", "down"),
        ("metric", "train/loss"),
        ("metric", "eval_channel_loss/"),
        ("n_trials", 0),
        ("n_jobs", 0),
        ("seed", -1),
        ("reduction", 1),
    ],
)
def test_an_option_that_means_nothing_is_refused_by_name(name, value):
    with pytest.raises(ConfigError) as caught:
        checked_options({"_target_": "x", name: value})
    assert caught.value.where == f"hydra.sweeper.{name}"
    assert str(value) in str(caught.value)
