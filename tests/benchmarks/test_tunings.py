"""The benchmark of tunings: its rows have the keys of PEFT's method comparison suite."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# As its result files have them.
RUN_INFO = {
    *("created_at", "total_time", "experiment_name", "peft_branch", "train_config"),
    *("peft_config", "error_msg"),
}
TRAIN_INFO = {
    *("accelerator_memory_reserved_avg", "accelerator_memory_max"),
    *("accelerator_memory_reserved_99th", "train_time", "file_size", "num_trainable_params"),
    *("num_total_params", "status", "metrics"),
}
META_INFO = {"model_info", "dataset_info", "package_info", "system_info", "pytorch_info"}


def test_every_method_is_an_arm_and_every_arm_composes():
    from tunings import ARMS, config_of

    from posttrain_dist.config import SLOTS, AutoTuning

    methods = set(SLOTS["tuning"].values()) - {AutoTuning}  # it becomes one of them
    assert {type(tuning) for tuning in ARMS.values()} == methods
    rates = {arm: config_of(arm, None, 0, 1).optimizer.lr for arm in ARMS}  # type: ignore[attr-defined]
    assert rates["full"] < rates["lora"] < rates["prompt"]


def test_the_summary_of_an_arm_is_the_mean_over_its_seeds():
    from tunings import summary_of

    facts = dict.fromkeys(("date", "run", "command", "machine", "python", "versions"), "x")
    facts |= {"load_1min": 1.0, "arm": "lora", "lr": 1e-3, "steps": 3}
    shared = {"trainable": 10, "saved_bytes": 40, "heldout_before": 4.0, "tokens_per_s": 5.0}
    shared |= {"exact_match": 0.5, "peak_bytes": 7}
    found = [{**facts, **shared, "seed": s, "heldout": h} for s, h in ((0, 3.0), (1, 1.0))]
    summary = summary_of(found)
    assert (summary["heldout"], summary["heldout_low"], summary["heldout_high"]) == (2.0, 1.0, 3.0)
    assert (summary["seeds"], summary["summary"], summary["trainable"]) == ([0, 1], True, 10)


@pytest.mark.slow
def test_a_row_of_a_run(tmp_path):
    command = ["benchmarks/tunings.py", "--arms", "ia3", "--steps", "2", "--seeds", "0"]
    command += ["--factors", "--results", str(tmp_path)]
    subprocess.run([sys.executable, *command], cwd=ROOT, check=True, timeout=300)
    row, summary = map(json.loads, (tmp_path / "tunings.jsonl").read_text().splitlines())
    assert row["run_info"].keys() == RUN_INFO
    assert row["train_info"].keys() == TRAIN_INFO
    assert row["meta_info"].keys() >= META_INFO
    assert row["run_info"]["peft_config"]["kind"] == "ia3"
    # Five layers: keys and values of 96 numbers, the MLP's inside of 512.
    assert row["trainable"] == row["train_info"]["num_trainable_params"] == 5 * (96 + 96 + 512)
    assert row["saved_bytes"] > 4 * row["trainable"]
    assert summary["heldout"] == row["heldout"] == row["train_info"]["metrics"][-1]["valid loss"]
