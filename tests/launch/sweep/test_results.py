"""What the table of a sweep is made of, from run folders written by hand."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from posttrain_launch.compose.composer import Composer
from posttrain_launch.sweep.create import _default_metric
from posttrain_launch.sweep.folder import (
    PRUNED,
    Sweep,
    Trial,
    append_trials,
    trial_folder,
    write_sweep,
)
from posttrain_launch.sweep.results import direction_of, read_results
from posttrain_launch.sweep.table import results_text

GIB = 2**30


def ended(
    folder: Path, losses: list[float], *, how: str, workers: int = 1, gpus: float = 0
) -> None:
    """A run folder whose steps took 10 s each."""
    logs = folder / "logs"
    logs.mkdir(parents=True)
    rows = [
        {"step": step, "eval/loss": loss, "eval_channel_loss/math": 10 - loss,
         "time_s": 10.0 * step, "system/memory_bytes": (5 - step) * GIB}
        for step, loss in enumerate(losses, 1)
    ]  # fmt: skip
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for rank in range(workers):
        (logs / f"rank-{rank}.log").touch()
    if gpus:
        (folder / "plan.json").write_text(json.dumps({"plan": {"on_gpu": True}}))
        (folder / "config.yaml").write_text(f"cluster:\n  gpus_per_worker: {gpus}\n")
    if how == "done":
        (folder / "FINISHED").write_text("{}")
    elif how == "pruned":
        (folder / PRUNED).write_text("step 1\n")
    elif how == "failed":
        (folder / "failed.json").write_text(json.dumps({"code": 1, "error": "no room"}))


@pytest.fixture
def sweep(tmp_path: Path) -> Sweep:
    sweep = Sweep(folder=tmp_path / "s", name="s", command="c", created="t", cwd="/")
    write_sweep(sweep)
    shared = ("model.path=/m", "train.steps=3")
    trials = [
        Trial(number, (*shared, f"optimizer.lr={lr}"), trial_folder(sweep.folder, number))
        for number, lr in enumerate(("1e-4", "2e-4", "3e-4", "4e-4", "5e-4"))
    ]
    append_trials(sweep.folder, trials)
    ended(trials[0].folder, [3.0, 2.5, 2.0], how="done", workers=4, gpus=1.0)
    ended(trials[1].folder, [3.0, 1.5], how="done", workers=1, gpus=0.25)
    ended(trials[2].folder, [1.0], how="pruned")
    ended(trials[3].folder, [0.5, float("nan")], how="failed")
    return sweep


def test_cost_is_time_times_gpus_and_memory_the_peak(sweep):
    rows = {row["number"]: row for row in read_results(sweep)["trials"]}
    assert rows[0]["cost_s"] == 30.0 * 4
    assert rows[1]["cost_s"] == 20.0 * 0.25
    assert rows[2]["cost_s"] == 10.0
    assert (rows[0]["memory_bytes"], rows[4]["memory_bytes"]) == (4 * GIB, None)
    assert rows[1]["curves"]["eval_channel_loss/math"] == [[1, 7.0], [2, 8.5]]
    assert rows[1]["varied"] == {"optimizer.lr": "2e-4"}


def test_the_best_is_one_that_was_done_by_the_metric_that_is_named(sweep):
    results = read_results(sweep)
    # Every value in its place, those that are none of the end among them; NaN is no value.
    assert [(row["number"], row["value"]) for row in results["trials"]] == [
        (3, 0.5), (2, 1.0), (1, 1.5), (0, 2.0), (4, None),
    ]  # fmt: skip
    assert [row["state"] for row in results["trials"]] == [
        "failed", "pruned", "done", "done", "waiting",
    ]  # fmt: skip
    assert results["best"] == 1
    assert results["winner"] == ("posttrain train model.path=/m train.steps=3 optimizer.lr=2e-4")
    assert read_results(sweep, "eval_channel_loss/math")["best"] == 0
    assert read_results(replace(sweep, direction="maximize"))["best"] == 0
    array = read_results(replace(sweep, backend={"kind": "slurm_array"}))
    assert array["winner"].startswith("posttrain submit model.path=/m ")


@pytest.mark.parametrize(
    ("metric", "direction"),
    [
        ("eval/loss", "minimize"),
        ("eval_channel_loss/accuracy", "minimize"),  # a channel of that name
        ("eval_dpo/accuracy", "maximize"),
        ("eval_dpo_channel_margin/sort", "maximize"),
        ("eval_reward/calibration_error", "minimize"),
    ],
)
def test_which_way_a_metric_is_better(metric, direction):
    assert direction_of(metric) == direction


@pytest.mark.parametrize(
    ("words", "metric", "direction"),
    [
        ([], "eval/loss", "minimize"),
        # A loss of beta=0.1 and one of 0.5 say nothing of each other.
        (["objective=dpo"], "eval_dpo/accuracy", "maximize"),
        (["objective=kto"], "eval_kto/accuracy", "maximize"),
        (["objective=reward"], "eval_reward/accuracy", "maximize"),
    ],
)
def test_trials_that_compare_answers_are_sorted_by_how_often_they_are_right(
    words, metric, direction
):
    with Composer() as composer:
        assert _default_metric(composer.compose(words)) == (metric, direction)


def test_the_table_says_it_in_words(sweep):
    text = results_text(read_results(sweep))
    lines = [line.split() for line in text.splitlines()]
    assert lines[0][:7] == ["trial", "what", "differs", "state", "held-out", "loss", "step"]
    assert [
        *lines[4][:6], *lines[4][6:8],
    ] == ["1", "optimizer.lr=2e-4", "done", "1.5000", "2", "5.0", "4.00", "GiB"]  # fmt: skip
    assert "trial 3 failed: no room" in text
    assert "the best, trial 1, as a run of its own:" in text
    assert "(train.steps ends it early" in text
