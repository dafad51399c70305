"""The cluster's simulation beside closed forms, and whether it sees a wrong decision."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from posttrain_launch.lifecycle.decide import Policy

from posttrain_dist.planner.speed.intervals import checkpoint_interval, effective_share

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks/results/cluster_simulation.jsonl"
DAYS = 4000


@pytest.fixture
def sim(on_path):
    import cluster_simulation

    return cluster_simulation


def test_the_closed_form_is_daly_s_where_there_are_no_limits(sim):
    world = replace(sim.World(), hold_s=0.0, detect_s=0.0, limit_s=1e9, failure_gpu_hours=5000.0)
    interval_s = checkpoint_interval(world.save_s, world.failure_s)
    restart_s = world.boot_s + world.save_s
    daly = effective_share(interval_s, world.save_s, world.failure_s, restart_s)
    assert sim.expected_share(world, interval_s, 120.0) == pytest.approx(daly, rel=1e-9)


def test_the_closed_form_without_failures_is_arithmetic(sim):
    world = replace(sim.World(), failure_gpu_hours=1e15)
    # 86,400 s less the lead of 90: 86 s to begin, four stretches of 5 h with their saves, the rest
    kept = 86_400 - 90 - 86 - 4 * 60
    spent = 86_400 - 90 + 60 + 30 + 121
    assert sim.expected_share(world, 18_000.0, 90.0) == pytest.approx(kept / spent, rel=1e-6)


def test_the_product_s_decisions_are_near_the_optimum(sim):
    world, choices = sim.World(), sim.Choices()
    tally = sim.simulate(world, choices, DAYS)
    best, _ = sim.optimum(world)
    assert 0.98 < best < 0.995
    assert best - 0.003 < tally.effective < best + 0.001
    # As many failures as are assumed, within four standard deviations, and no job stands still.
    expected = DAYS * 86_400 / world.failure_s
    assert abs(tally.failures - expected) < 4 * math.sqrt(expected)
    assert tally.ended == []
    assert tally.saves_cut == 0
    assert tally.longest_standstill_s < 2 * world.limit_s


@pytest.mark.parametrize(
    ("wrong", "at_least"),
    [
        ({"lead": lambda saves, world: 0.0}, 0.10),  # half a day's stretch is lost every day
        ({"lead": lambda saves, world: world.save_s / 2}, 0.10),  # the save is cut off
        ({"interval_s": 900.0}, 0.05),
        ({"policy": Policy(requeue=False)}, 0.90),
    ],
)
def test_a_wrong_decision_is_seen(sim, wrong, at_least):
    right = sim.simulate(sim.World(), sim.Choices(), DAYS / 8)
    tally = sim.simulate(sim.World(), sim.Choices(**wrong), DAYS / 8)
    assert right.effective - tally.effective > at_least


def test_a_job_that_can_save_nothing_ends_instead_of_coming_back_for_ever(sim):
    world = replace(sim.World(), save_s=3000.0, limit_s=3600.0)
    tally = sim.simulate(world, sim.Choices(), 100, jobs=4)
    assert tally.starts == 4 * 3
    assert len(tally.ended) == 4
    assert all("3 starts in a row without progress" in reason for reason in tally.ended)


def test_saves_share_the_storage(sim, monkeypatch):
    monkeypatch.setattr(sim, "FULL_SPEED", 1)
    often = sim.Choices(interval_s=36.0)
    alone = sim.simulate(sim.World(), often, 4, jobs=1)
    two = sim.simulate(sim.World(), often, 8, jobs=2)
    assert alone.longest_save_s == pytest.approx(60)
    assert alone.effective == pytest.approx(36 / 96, abs=0.01)
    # Each trains 36 s while the other may save: a save takes 84 to 120 s, a round 36 s more.
    assert 84 < two.longest_save_s < 120.001
    assert 36 / 156 - 0.01 < two.effective < 36 / 120


def test_the_kept_rows_are_of_a_hundred_thousand_job_days():
    rows = [json.loads(line) for line in RESULTS.read_text().splitlines()]
    newest = {row["arm"]: row for row in rows if row["job_days"] >= 100_000}
    row = newest["as it is"]
    assert abs(row["below_optimum_points"]) <= 0.3
    assert row["ended"] == 0
    assert row["longest_standstill_h"] < 48
    assert newest["lead 0"]["below_optimum_points"] > 10
