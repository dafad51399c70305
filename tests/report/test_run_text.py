"""The closing text of a run: losses and right answers before and after, and where all is."""

from __future__ import annotations

import json
from pathlib import Path

from posttrain_dist.report.run.run_text import run_text


def test_the_closing_table(tmp_path: Path):
    def add(**row: float) -> None:
        with (tmp_path / "metrics.jsonl").open("a") as stream:
            stream.write(json.dumps(row) + "\n")

    add(step=0, **{"eval/loss": 3.0, "eval_channel_loss/a": 2.0})
    add(step=5, **{"train/loss": 7.0})
    add(step=9, **{"eval/loss": 1.5, "eval_channel_loss/a": 1.25})
    answers = {
        "exact_match": {
            "before": {"a": {"right": 1, "of": 8}},
            "after": {"a": {"right": 7, "of": 8}},
        },
        "samples": [
            {"channel": "b", "prompt": "p", "reference": "r", "before": "x\x1b[2J", "after": "y"}
        ],
    }
    (tmp_path / "answers.json").write_text(json.dumps(answers))
    (tmp_path / "report.html").touch()
    text = run_text(tmp_path)
    rows = [line.split() for line in text.splitlines()]
    assert ["a", "2.0000", "1.2500"] in rows
    assert ["all", "channels", "3.0000", "1.5000"] in rows
    assert ["a", "1/8", "7/8"] in rows
    assert "\x1b" not in text
    assert str(tmp_path / "report.html") in text
    assert "export" not in text  # there is none


def test_a_run_that_was_evaluated_once_has_one_column(tmp_path: Path):
    row = {"step": 6, "eval/loss": 1.5, "eval_channel_loss/a": 1.25}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    assert run_text(tmp_path).splitlines()[:3:2] == [
        "held-out loss  step 6",
        "a              1.2500",
    ]
