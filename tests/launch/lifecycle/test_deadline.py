"""The end of a job, and what asks a run to stop before it."""

import json
import os
import signal
import time
from datetime import datetime

import pytest
from posttrain_launch.lifecycle.deadline import job_end, stopped_before_end
from posttrain_launch.lifecycle.decide import Cause
from posttrain_launch.run.stop_request import request_stop, requested_cause, stopped_by_signals
from ray_runs import wait_until

from posttrain_dist.errors import ConfigError

NOON = datetime.fromisoformat("2027-01-31T12:00:00+01:00").timestamp()


@pytest.mark.parametrize("typed", [str(NOON), "2027-01-31T12:00:00+01:00", "2027-01-31T11:00:00Z"])
def test_a_deadline_is_seconds_or_an_iso_time(typed, tmp_path):
    assert job_end({"POSTTRAIN_DEADLINE": typed, "SLURM_JOB_END_TIME": "5"}) == NOON
    (tmp_path / "end").write_text(typed + "\n")
    assert job_end({"POSTTRAIN_DEADLINE_FILE": str(tmp_path / "end")}) == NOON


def test_what_slurm_says_comes_last(tmp_path):
    environment = {"POSTTRAIN_DEADLINE_FILE": str(tmp_path / "end"), "SLURM_JOB_END_TIME": "5"}
    assert job_end(environment) == 5  # there is no such file
    (tmp_path / "end").write_text("")
    assert job_end(environment) == 5
    (tmp_path / "end").write_text("7")
    assert job_end(environment) == 7
    assert job_end({}) is None


def test_a_deadline_that_is_no_time_is_refused():
    with pytest.raises(ConfigError, match="POSTTRAIN_DEADLINE: is 'tonight'"):
        job_end({"POSTTRAIN_DEADLINE": "tonight"})


def test_a_run_is_stopped_once_as_its_end_comes_near(tmp_path, monkeypatch):
    """Of a lead that is measured: 100 s, of which a change of the limit makes the end."""
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "saves.json").write_text('{"save_s": [40]}')
    rows = [json.dumps({"step": step, "time_s": 5.0 * step}) for step in range(3)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(rows) + "\n")
    end = tmp_path / "end"
    end.write_text(str(time.time() + 3600))
    monkeypatch.setenv("POSTTRAIN_DEADLINE_FILE", str(end))
    monkeypatch.setattr("posttrain_launch.lifecycle.deadline.POLL_S", 0.01)
    said = []
    with stopped_before_end(tmp_path, said.append):
        time.sleep(0.1)
        assert said == []
        end.write_text(str(time.time() + 99))  # 1.5 * 40 + 2 * 5 + 30 = 100
        # Half of a job's time is what a stop takes at most; this one has just begun.
        time.sleep(0.1)
        assert said == []
        end.write_text(str(time.time() + 10))
        monkeypatch.setattr("posttrain_launch.lifecycle.deadline.within_limit", lambda s, _: s)
        wait_until(lambda: said, 10)
        time.sleep(0.1)
    [line] = said
    assert "100 s are kept for that: measured" in line


def test_the_first_request_to_stop_keeps_its_cause(tmp_path):
    request_stop(tmp_path, Cause.time_limit)
    request_stop(tmp_path, Cause.preempted)
    assert requested_cause(tmp_path) is Cause.time_limit


@pytest.mark.parametrize(
    ("text", "cause"),
    [("", "stopped"), ("cancel", "stopped"), ("time_limit\n", "time_limit"),
     ("preempted", "preempted"), ("finished", "stopped")],
)  # fmt: skip
def test_who_asked_a_run_to_stop(text, cause, tmp_path):
    (tmp_path / "STOP").write_text(text)
    assert requested_cause(tmp_path) == cause


@pytest.mark.parametrize(
    ("number", "in_slurm", "cause"),
    [
        (signal.SIGUSR1, True, "time_limit"),
        (signal.SIGUSR2, True, "time_limit"),
        (signal.SIGTERM, True, "preempted"),
        (signal.SIGINT, True, "stopped"),
        (signal.SIGTERM, False, "stopped"),
        (signal.SIGUSR1, False, "stopped"),
    ],
)
def test_a_signal_means_what_its_sender_means(number, in_slurm, cause, tmp_path, monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    if in_slurm:
        monkeypatch.setenv("SLURM_JOB_ID", "71")
    said = []
    with stopped_by_signals(tmp_path, log=said.append):
        os.kill(os.getpid(), number)
    assert requested_cause(tmp_path) == cause
    assert said[0].startswith(f"{number.name}: saving and leaving")
