"""What the log of a run says of its plan, and that a choice is read back as it was written."""

from __future__ import annotations

from pathlib import Path

from made_plans import FITS, FULL_HOST, TIGHT

from posttrain_dist.planner.plan import Choice, Tried
from posttrain_dist.planner.plan_file import planned_lines, read_choice, write_plan

TRIED = (
    Tried("full, ZeRO-1", TIGHT, leanest=FULL_HOST),
    Tried("full, one GPU", None, "there are 32 GPUs"),
    Tried("full, ZeRO-3", FITS),
    Tried("LoRA", FITS),
)


def test_the_log_has_the_choice_and_why_not_those_before_it(tmp_path: Path):
    write_plan(tmp_path, Choice(TRIED, TRIED[2]))
    assert planned_lines(tmp_path) == [
        "planned: full, ZeRO-3; 65.000 GiB allocated in backward, 24 s a step",
        "planned: not full, ZeRO-1: 12.0 GiB are missing on a GPU of 60.0 GiB; most is optimizer "
        "moments",
        "planned: not full, one GPU: there are 32 GPUs",
    ]
    assert read_choice(tmp_path) == Choice(TRIED, TRIED[2])


def test_a_run_that_was_not_planned_has_no_such_lines(tmp_path: Path):
    assert planned_lines(tmp_path) == []
    (tmp_path / "plan.json").write_text('{"plan": {}, "choice": {"tried": []}}')
    assert planned_lines(tmp_path) == []
