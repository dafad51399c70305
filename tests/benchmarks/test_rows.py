"""How the benchmarks measure: turns, quantiles, memory, rows."""

import json
import subprocess
import sys
from pathlib import Path

import pytest


def test_arms_take_turns_and_warm_up_is_not_kept(monkeypatch):
    import rows

    calls: list[str] = []
    clock = iter(range(1000))
    monkeypatch.setattr(rows.time, "perf_counter", lambda: float(next(clock)) ** 2)
    taken = rows.take_turns(
        {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=2, warmup=1
    )
    assert calls == ["a", "b"] * 3
    # Call k lies between the readings 2k and 2k + 1, whose squares are 4k + 1 apart.
    assert taken == {"a": [9.0, 17.0], "b": [13.0, 21.0]}


def test_no_round_begins_after_the_end_but_one_is_always_made():
    import rows

    taken = rows.take_turns({"a": lambda: None}, rounds=50, until=0.0)
    assert len(taken["a"]) == 1


def test_quantiles_and_the_ratio_of_each_round():
    import rows

    found = rows.quantiles([5.0, 1.0, 2.0, 4.0, 3.0, 6.0])
    assert found == {"p20_s": 2.0, "p50_s": 3.5, "p80_s": 5.0, "rounds": 6}
    # The ratio of medians would be 3.
    assert rows.times_faster([2.0, 30.0, 30.0], [1.0, 10.0, 60.0]) == 2.0


PEAK = """
import numpy as np
import rows
there = np.ones(20_000_000 // 8)
with rows.Peak() as peak:
    gone = np.ones(80_000_000 // 8)
    del gone
    kept = np.ones(10_000_000 // 8)
print(peak.over_start_bytes, len(there) + len(kept))
"""


def test_the_peak_counts_what_was_given_back_but_not_what_was_there():
    """In a process of its own: a step that ran in this one keeps freed memory from then on."""
    import rows

    folder = Path(rows.__file__).parent
    command = [sys.executable, "-c", PEAK]
    found = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    assert float(found.stdout.split()[0]) == pytest.approx(80e6, rel=0.05)


def test_a_fresh_process_is_read_by_its_last_line_and_its_failure_is_told(tmp_path):
    import rows

    script = tmp_path / "child.py"
    script.write_text("import os\nprint('noise')\nprint('{\"a\": ' + os.environ['A'] + '}')\n")
    assert rows.fresh_process([str(script)], A="3") == {"a": 3}
    with pytest.raises(RuntimeError, match="KeyError"):
        rows.fresh_process([str(script)])


def test_rows_are_appended_with_what_was_typed(tmp_path, monkeypatch):
    import rows

    monkeypatch.setattr(sys, "argv", ["/x/head.py", "--results", "/y", "--rows", "8"])
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    facts = rows.facts(["numpy", "no-such-thing"])
    rows.append("x", [facts | {"arm": "a"}], tmp_path)
    rows.append("x", [facts | {"arm": "b"}], tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "x.jsonl").read_text().splitlines()]
    assert [line["arm"] for line in lines] == ["a", "b"]
    assert lines[0]["command"] == "OMP_NUM_THREADS=1 python benchmarks/head.py --rows 8"
    assert lines[0]["versions"]["no-such-thing"] == "-"
    assert lines[0]["run"] == lines[1]["run"]
