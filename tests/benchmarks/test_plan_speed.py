"""The planner's tokens a second beside published ones: near, and in the right order."""

from __future__ import annotations

import json
import statistics
from itertools import combinations
from pathlib import Path

from posttrain_dist.config import Dtype, Hardware, RunConfig, TrainConfig, complete
from posttrain_dist.models import ModelConfig
from posttrain_dist.planner.job import DataFacts
from posttrain_dist.planner.machine import find_machine
from posttrain_dist.planner.make_job import make_job
from posttrain_dist.planner.speed.step_time import step_time

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks/results"


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


def test_our_own_steps_on_a_cpu_are_met_within_a_factor_of_two(tmp_path):
    # benchmarks/step.py, in float32 on two cores with AVX2: tokens a second, supervised share.
    measured = {0.3: [], 1.0: []}
    with (RESULTS / "step.jsonl").open() as lines:
        for row in map(json.loads, lines):
            if row.get("arm") == "ours" and row["part"] in ("step", "as_it_is"):
                measured[1.0 if row["kind"] == "uniform" else 0.3].append(row["tokens_per_s"])
    sizes = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 6}
    sizes |= {"intermediate_size": 1024, "vocab_size": 16000, "max_position_embeddings": 2048}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **sizes}))
    hardware = Hardware(gpus_per_node=0, cpus_per_node=2, host_memory_gib=24)
    config = RunConfig(model=ModelConfig(path=str(tmp_path)), hardware=hardware)
    config.data.max_length = 2048
    config.train = TrainConfig(batch_size=1, dtype=Dtype.float32)
    machine = find_machine(config := complete(config), plans_only=True)
    for share, found in measured.items():
        assert len(found) >= 4
        tokens = 10**6
        facts = DataFacts(
            tokens=tokens,
            supervised=round(share * tokens),
            longest=256,
            channels=1,
            heldout_tokens=0,
        )
        job = make_job(config, machine, facts)
        said = job.row_tokens / step_time(job).step_s
        assert 0.5 < said / statistics.median(found) < 2
