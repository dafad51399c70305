"""What runs that compare answers show: accuracy in the line of a step, tables, charts."""

from __future__ import annotations

import json

from posttrain_dist.report.run.compared import accuracy_text, compared_charts, compared_table
from posttrain_dist.report.run.progress import describe
from posttrain_dist.report.run.read import read_run
from posttrain_dist.report.run.run_page import write_report
from posttrain_dist.report.run.run_text import run_text

ROWS = [
    {
        "step": 0,
        "eval/loss": 0.6931,
        "eval_dpo/accuracy": 0.0,
        "eval_dpo/raw_accuracy": 0.4,
        "eval_dpo/margin": 0.0,
        "eval_dpo/chosen_logprob": -20.0,
        "eval_dpo_channel_accuracy/sort": 0.0,
    },
    {
        "step": 10,
        "train/loss": 0.41,
        "dpo/accuracy": 0.75,
        "dpo/margin": 0.5,
        "dpo/chosen_logprob": -19.0,
        "eval/loss": 0.5,
        "eval_dpo/accuracy": 0.7,
        "eval_dpo/raw_accuracy": 0.6,
        "eval_dpo/margin": 0.31,
        "eval_dpo/chosen_logprob": -21.5,
        "eval_dpo_channel_accuracy/sort": 0.8,
    },
]


def made(folder):
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return folder


def test_the_line_of_a_step_says_how_often_it_is_right():
    assert describe(ROWS[1], 20, None) == (
        "step 10/20  loss 0.4100  held-out loss 0.5000  accuracy 75%  held-out accuracy 70%"
    )
    assert accuracy_text({"step": 1, "train/loss": 2.0, "eval/accuracy": 0.5}) == []


def test_tables_of_the_first_and_the_last_evaluation(tmp_path):
    table = compared_table(ROWS)
    assert "held-out accuracy" in table and "held-out raw accuracy" in table
    [sort] = [line.split() for line in table.splitlines() if line.startswith("sort")]
    assert sort == ["sort", "0.0%", "80.0%"]
    assert table in run_text(made(tmp_path))
    assert compared_table([{"step": 0, "eval/loss": 2.0, "eval/accuracy": 0.5}]) == ""


def test_charts_say_where_more_is_better(tmp_path):
    run = read_run(made(tmp_path))
    charts = {chart.title: chart for chart in compared_charts(run)}
    assert charts["Accuracy"].note == "0.0% → 70.0%" and charts["Accuracy"].tone == "good"
    better = charts["Log-probability of the better answer"]
    assert better.tone == "bad"  # it became less likely
    assert [(each["name"], each["x"], each["y"]) for each in better.series] == [
        ("training", [10], [-19.0]),
        ("held-out", [0, 10], [-20.0, -21.5]),
    ]
    page = write_report(tmp_path).read_text()
    assert "Log-probability of the better answer" in page
