"""The planner's tokens a second beside published ones: near, and in the right order."""

from __future__ import annotations

import json
import statistics
from itertools import combinations


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
    held_out = [
        ratio
        for anchor, ratio in ratios.items()
        if (anchor.source, anchor.gpu) == plan_speed.HELD_OUT
    ]
    assert len(held_out) == 8
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


def test_each_leaves_a_row(tmp_path, monkeypatch, capsys):
    import plan_speed

    few = [anchor for anchor in plan_speed.ANCHORS if anchor.offload or anchor.nf4][:3]
    monkeypatch.setattr(plan_speed, "ANCHORS", few)
    monkeypatch.setattr("sys.argv", ["plan_speed.py", "--results", str(tmp_path)])
    plan_speed.main()
    written = [json.loads(line) for line in (tmp_path / "plan_speed.jsonl").open()]
    assert [row["published"] for row in written] == [anchor.published for anchor in few]
    assert all(row["ratio"] == row["planned"] / row["published"] for row in written)
    assert "llama3-8b QLoRA, 1 x rtx4090, 2 x 2,048 tokens, recomputed" in written[0]["arm"]
    assert "3 trainings: median ratio" in capsys.readouterr().out
