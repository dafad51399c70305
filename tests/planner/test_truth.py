"""What the planner predicts of a rank's memory beside what a run allocates.

Measured is the code of training itself, every tensor counted from the operation that makes it to
the moment when its last holder lets go.
"""

import json
import re
import statistics
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
HIGHEST, LOWEST, MEDIAN = 0.05, -0.01, 0.02
DIFFERENCE = 0.25


@pytest.fixture
def plan_truth(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import plan_truth

    yield plan_truth
    for name in [path.stem for path in BENCHMARKS.glob("*.py")]:
        sys.modules.pop(name, None)


def in_this_process(plan_truth, name, folder):
    """A row of the table; what was allocated before does not count."""
    arm = plan_truth.arms.ARMS[name]
    predicted = plan_truth.predict(arm, folder)
    return plan_truth.row_of(predicted, plan_truth.measure_here(arm, folder))


@pytest.mark.parametrize(
    "name",
    [
        *("llama", "llama checkpoint 2", "lora rank 16", "gemma2 prompt uneven"),
        *("dpo", "dpo lora", "dpo frozen", "reward"),
    ],
)
def test_the_peak_is_predicted(plan_truth, tmp_path, name):
    row = in_this_process(plan_truth, name, tmp_path)
    assert LOWEST <= row["error"] <= HIGHEST, row["phases"]
    # Not only the fullest phase: each of an update is what the run allocates in it.
    for phase in ("forward and loss", "backward", "optimizer step", "evaluation"):
        predicted, measured = row["phases"][phase]
        assert predicted == pytest.approx(measured, rel=0.02), phase


@pytest.mark.slow  # the partitions of two ranks are measured by default, test_zero_partitions.py
@pytest.mark.parametrize("name", ["zero-2 recomputed 2 x 256"])
def test_the_peak_of_ranks_is_predicted(plan_truth, tmp_path, run_workers, name):
    arm = plan_truth.arms.ARMS[name]
    predicted = plan_truth.predict(arm, tmp_path)
    outputs = run_workers("measure_arm.py", arm.workers, name, tmp_path)
    ranks = [json.loads(re.search(r"TOLD (.*)", output)[1]) for output in outputs]
    row = plan_truth.row_of(predicted, plan_truth.fullest(ranks))
    assert LOWEST <= row["error"] <= HIGHEST, row["phases"]


@pytest.mark.slow
@pytest.mark.timeout(7200)  # each of its runs is a process
def test_the_table_holds(plan_truth):
    table = {name: plan_truth.compare(name) for name in plan_truth.arms.CPU}
    assert len(table) >= 40
    assert {(arm.stage, arm.workers) for arm in plan_truth.arms.CPU.values()} >= {
        (stage, workers) for stage in range(4) for workers in (1, 2)
    }
    errors = {name: row["error"] for name, row in table.items()}
    assert statistics.median(map(abs, errors.values())) <= MEDIAN
    past = {name: error for name, error in errors.items() if not LOWEST <= error <= HIGHEST}
    assert not past
    for left, right in plan_truth.arms.PAIRS:
        predicted, measured = (
            table[right][key] - table[left][key] for key in ("predicted_bytes", "measured_bytes")
        )
        assert predicted * measured > 0, (left, right)
        assert abs(predicted / measured - 1) <= DIFFERENCE, (left, right)


@pytest.mark.slow
def test_the_profiler_counts_the_same(plan_truth, tmp_path):
    """torch's own trace of its allocator, which also sees what kernels take for themselves."""
    found = plan_truth.measure_apart(plan_truth.arms.ARMS["llama"], tmp_path, profiled=True)
    trace, counter = found["profiler"]["trace"], found["profiler"]["counter"]
    assert trace == pytest.approx(counter, rel=4e-4)
