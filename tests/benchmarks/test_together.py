"""The benchmark of trials that train together, at its smallest."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "together.py"


@pytest.mark.slow
def test_both_ways_give_a_row(tmp_path):
    words = ["--trials", "2", "--hidden", "64", "--steps", "1", "--results", str(tmp_path)]
    subprocess.run([sys.executable, BENCHMARK, *words], check=True, capture_output=True)
    rows = [json.loads(line) for line in (tmp_path / "together.jsonl").read_text().splitlines()]
    assert [(row["trials"], row["arm"]) for row in rows] == [(2, "together"), (2, "one by one")]
    assert all(row["peak_bytes"] > row["base_bytes"] > 10**6 for row in rows)
