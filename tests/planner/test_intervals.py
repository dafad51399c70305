"""Checkpoint intervals: the closed forms, and a run with failures that is played through."""

from __future__ import annotations

import math
import random

import pytest

from posttrain_dist.config import Hardware
from posttrain_dist.planner.speed.intervals import checkpoint_interval, effective_share


@pytest.mark.parametrize("failure_s", [3_600.0, 86_400.0, 2_600_000.0])
def test_cheap_checkpoints_come_as_often_as_young_says(failure_s):
    for checkpoint_s in (1e-6, 1e-4):
        young = math.sqrt(2 * checkpoint_s * failure_s)
        assert checkpoint_interval(checkpoint_s, failure_s) == pytest.approx(young, rel=1e-3)


@pytest.mark.parametrize("checkpoint_s", [5.0, 60.0, 400.0])
@pytest.mark.parametrize("restart_s", [0.0, 600.0])
def test_no_other_interval_trains_a_larger_share(checkpoint_s, restart_s):
    failure_s = 10_000.0
    best = checkpoint_interval(checkpoint_s, failure_s)
    share = effective_share(best, checkpoint_s, failure_s, restart_s)
    others = [
        effective_share(best * factor, checkpoint_s, failure_s, restart_s)
        for factor in [0.2 + 0.01 * i for i in range(480)]
    ]
    assert share >= max(others) * (1 - 1e-4)


def test_a_checkpoint_that_takes_longer_than_the_machine_lives_is_written_once_a_life():
    assert checkpoint_interval(300.0, 100.0) == 100.0
    assert effective_share(100.0, 1e6, 100.0, 0.0) == 0.0


def test_the_share_is_that_of_runs_with_failures_played_through():
    interval_s, checkpoint_s, failure_s, restart_s = 900.0, 120.0, 5_000.0, 300.0
    draw = random.Random(0)
    now = trained = 0.0
    fails = draw.expovariate(1 / failure_s)
    while trained < 20_000_000:
        if now + interval_s + checkpoint_s <= fails:
            now += interval_s + checkpoint_s
            trained += interval_s
            continue
        now = fails
        fails = now + draw.expovariate(1 / failure_s)
        while now + restart_s > fails:  # it fails again while it starts
            now = fails
            fails = now + draw.expovariate(1 / failure_s)
        now += restart_s
    expected = effective_share(interval_s, checkpoint_s, failure_s, restart_s)
    assert trained / now == pytest.approx(expected, rel=0.01)


def test_nodes_fail_as_often_as_those_that_trained_llama_3():
    # 419 unexpected interruptions in 54 days of 16,384 GPUs, 8 to a node (arXiv:2407.21783).
    nodes, hours = 16_384 / 8, 54 * 24
    assert Hardware().node_failure_hours == pytest.approx(nodes * hours / 419, rel=0.02)
    failure_s = Hardware().node_failure_hours * 3600 / nodes
    assert failure_s / 3600 == pytest.approx(3.1, abs=0.1)
    # "More than 90 % effective training time", with checkpoints of seconds and fast restarts.
    interval_s = checkpoint_interval(20.0, failure_s)
    assert 0.9 < effective_share(interval_s, 20.0, failure_s, 300.0) < 0.97
