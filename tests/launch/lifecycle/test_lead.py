"""How long before its time limit a run is stopped, and from what that follows."""

import json

import pytest
from posttrain_launch.lifecycle.lead import FLOOR_S, stop_lead_s, within_limit
from posttrain_launch.lifecycle.measured import lead_of, measured_steps


@pytest.mark.parametrize(
    ("save_s", "step_s", "pause_s", "lead_s"),
    [(0, 0, 0, 30), (60, 0, 0, 120), (0, 45, 0, 120), (60, 5, 100, 230), (400, 20, 0, 670)],
)
def test_the_lead_is_for_save_steps_pause_and_teardown(save_s, step_s, pause_s, lead_s):
    assert stop_lead_s(save_s, step_s, pause_s=pause_s) == lead_s
    assert stop_lead_s(save_s, step_s, pause_s=pause_s, teardown_s=0) == lead_s - 30


@pytest.mark.parametrize("broken", [-1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["save_s", "step_s", "pause_s", "teardown_s"])
def test_a_time_that_is_none_is_refused(name, broken):
    times = {"save_s": 1.0, "step_s": 1.0, name: broken}
    with pytest.raises(ValueError, match=name):
        stop_lead_s(**times)


@pytest.mark.parametrize(
    ("lead_s", "limit_s", "kept"), [(120, 3600, 120), (120, 60, 30), (120, None, 120), (120, 0, 0)]
)
def test_half_of_a_job_at_least_trains(lead_s, limit_s, kept):
    assert within_limit(lead_s, limit_s) == kept


# ------------------------------------------------------------------------------ of a run folder


def write_metrics(folder, times):
    rows = [{"step": step, "time_s": time_s, "train/loss": 1.0} for step, time_s in times]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "metrics.jsonl").write_text(text + '{"step": 99, "tim')  # torn by a kill


def write_saves(folder, *seconds):
    (folder / "logs").mkdir(exist_ok=True)
    (folder / "logs" / "saves.json").write_text(json.dumps({"save_s": seconds}))


def write_plan(folder, **speed):
    (folder / "plan.json").write_text(json.dumps({"plan": {"speed": speed}}))


def test_steps_are_measured_apart_from_saves_and_evaluations(tmp_path):
    # Two updates a row and 4 s each; 60 s of a save after step 4, 100 s of an evaluation at 8.
    write_metrics(tmp_path, [(0, 0), (2, 8), (4, 16), (6, 84), (8, 192), (10, 200), (12, 208)])
    write_saves(tmp_path, 60.0)
    times = measured_steps(tmp_path)
    assert times.step_s == 4.0
    assert times.pause_s == pytest.approx(100 - 60)
    write_saves(tmp_path, 5.0)
    assert measured_steps(tmp_path).pause_s == pytest.approx(100 - 5)


def test_a_run_without_two_rows_has_no_steps(tmp_path):
    assert measured_steps(tmp_path) is None
    write_metrics(tmp_path, [(1, 3.0)])
    assert measured_steps(tmp_path) is None
    write_metrics(tmp_path, [(5, 3.0), (1, 1.0)])  # cut back by a resume, and written again
    assert measured_steps(tmp_path) is None


def test_only_the_end_of_a_long_file_counts(tmp_path):
    slow = [(step, 100.0 * step) for step in range(2000)]
    fast = [(2000 + step, 199_900.0 + step) for step in range(1, 100)]
    write_metrics(tmp_path, slow + fast)
    assert measured_steps(tmp_path).step_s == 1.0


def test_measured_comes_before_planned_before_a_constant(tmp_path):
    assert lead_of(tmp_path) == (FLOOR_S, "nothing is measured yet")
    write_plan(tmp_path, step_s=10.0, checkpoint_s=200.0)
    assert lead_of(tmp_path) == (300 + 20 + 30, "planned")
    write_plan(tmp_path, step_s=1.0, checkpoint_s=2.0)  # a plan is a guess
    assert lead_of(tmp_path) == (FLOOR_S, "planned")
    write_saves(tmp_path, 40.0)
    assert lead_of(tmp_path) == (60 + 2 + 30, "the rehearsed save and the planned step")
    write_metrics(tmp_path, [(0, 0), (1, 5), (2, 10)])
    write_saves(tmp_path, 40.0, 80.0, 20.0)
    assert lead_of(tmp_path) == (120 + 10 + 30, "measured")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"plan": null}', '{"plan": {"speed": {}}}'])
def test_a_plan_that_cannot_be_read_is_none(text, tmp_path):
    (tmp_path / "plan.json").write_text(text)
    assert lead_of(tmp_path)[0] == FLOOR_S
