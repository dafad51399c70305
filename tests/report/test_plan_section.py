"""What the report of a planned run says of its plan, beside what was measured."""

from __future__ import annotations

import html
import json
import re
from pathlib import Path

import pytest
from made_plans import FITS, GIB, as_json, choice_json

from posttrain_dist.report import write_report


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    (tmp_path / "config.yaml").write_text("name: planned\n")
    (tmp_path / "overrides.yaml").write_text("- tuning=auto\n- engine=auto\n")
    rows = [
        {"step": k, "train/tokens_per_s": rate, "system/memory_bytes": used * GIB}
        for k, (rate, used) in enumerate([(10_000, 50), (24_029.5, 66.3), (30_000, 66.3)])
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def text_of(path: Path) -> str:
    body = re.sub(r"<(style|script).*?</\1>", "", path.read_text(), flags=re.DOTALL)
    return re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]+>", " ", body)))


def test_planned_and_measured_stand_side_by_side(run_folder: Path):
    plan = {"plan": as_json(FITS), "choice": choice_json()}
    (run_folder / "plan.json").write_text(json.dumps(plan))
    failed = {"tried": "full, ZeRO-2", "where": "backward", "what": "4 GiB of gradients"}
    (run_folder / "run.json").write_text(json.dumps({"fallbacks": [failed]}))
    text = text_of(write_report(run_folder))
    # 66.3 GiB at most of 65 planned, a median of 24,030 tokens/s of 524,288 / 24 planned.
    assert "allocated at the peak, each GPU 65.0 GiB 66.3 GiB +2.0 %" in text
    assert "tokens/s 21,845 24,030 +10.0 %" in text
    assert "full, ZeRO-3 was chosen, which fits: 8.00 GiB of each GPU to spare" in text
    assert "full, ZeRO-1 does not fit: each GPU lacks 12.0 GiB; most goes to optimizer" in text
    assert "full, ZeRO-2 ran out of memory (backward): 4 GiB of gradients" in text
    page = text_of(run_folder / "plan.html")
    assert "posttrain train tuning=auto engine=zero3 train.micro_batch_size=1" in page


def test_the_process_of_a_cpu_rank_is_not_compared_with_a_plan(run_folder: Path):
    plan = as_json(FITS) | {"on_gpu": False}
    (run_folder / "plan.json").write_text(json.dumps({"plan": plan, "choice": None}))
    text = text_of(write_report(run_folder))
    assert "allocated at the peak, each rank 65.0 GiB \N{EN DASH} \N{EN DASH}" in text
    assert "was chosen" not in text and "Why not" not in text


def test_a_run_that_was_not_planned_has_no_such_section(run_folder: Path):
    (run_folder / "plan.json").write_text('{"torn')
    assert "Plan" not in text_of(write_report(run_folder))
    assert not (run_folder / "plan.html").exists()
