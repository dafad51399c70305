"""The planner's tokens a second beside published ones: near, and in the right order."""

from __future__ import annotations

import statistics
from itertools import combinations

# Rows of this source on this GPU were taken in when nothing was fitted any more.
HELD_OUT = "a100_40"


def test_published_speeds_are_met():
    import plan_speed

    ratios = {
        anchor: plan_speed.planned(anchor) / anchor.published for anchor in plan_speed.ANCHORS
    }
    found = list(ratios.values())
    assert 0.9 < statistics.median(found) < 1.1
    assert sum(0.8 <= ratio <= 1.25 for ratio in found) >= 0.85 * len(found)
    assert min(found) > 0.7
    assert max(found) < 1.45
    held_out = [ratios[anchor] for anchor in ratios if anchor.gpu == HELD_OUT]
    assert len(held_out) == 9
    assert all(0.85 <= ratio <= 1.15 for ratio in held_out)

    # What is clearly faster for others is faster in the plan.
    pairs = [
        (slow, fast)
        for slow, fast in combinations(sorted(ratios, key=lambda one: one.published), 2)
        if fast.published > 1.5 * slow.published
    ]
    right = [ratios[fast] * fast.published > ratios[slow] * slow.published for slow, fast in pairs]
    assert len(right) > 1000
    assert sum(right) >= 0.99 * len(right)


def test_the_table_has_a_row_for_each(capsys):
    import plan_speed

    plan_speed.main()
    printed = capsys.readouterr().out
    rows = [line for line in printed.splitlines() if line.startswith("| ")]
    assert len(rows) == 1 + len(plan_speed.ANCHORS)
    assert "| llama3-70b full offload, 8 x a100_80, 2 x 2,048 tokens, recomputed | 196 |" in printed
    assert f"{len(plan_speed.ANCHORS)} trainings: median ratio" in printed
