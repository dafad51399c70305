"""Folder and queue as one state: who is believed when they differ."""

from __future__ import annotations

import json
import os
import re
import time
from datetime import datetime
from pathlib import Path

import pytest
from posttrain_launch.batch.queue import QueuedJob
from posttrain_launch.run.driver_lock import Driver
from posttrain_launch.run.job_record import new_record, write_job
from posttrain_launch.status.find_runs import find_runs
from posttrain_launch.status.run_facts import read_facts, read_starts
from posttrain_launch.status.run_state import RunState, Survey, state_of, status_of, survey
from posttrain_launch.status.status_table import table_json, table_lines

from posttrain_dist.errors import ClusterError, PosttrainError, error_fields

ROW = {"train/loss": 2.5, "train/tokens_per_s": 5123.0}


def iso(ago_s: float) -> str:
    return datetime.fromtimestamp(time.time() - ago_s).astimezone().isoformat(timespec="seconds")


@pytest.fixture
def run(tmp_path) -> Path:
    """A run at step 40 of 100, 2 s a step, whose second start is ten minutes old."""
    folder = tmp_path / "outputs" / "chat" / "20260101-120000"
    (folder / "logs").mkdir(parents=True)
    (folder / "config.yaml").write_text("name: chat\n")
    rows = [{"step": step, **ROW, "time_s": 2.0 * step} for step in range(1, 41)]
    write_lines(folder / "metrics.jsonl", rows)
    (folder / "logs" / "plan.json").write_text('{"total_steps": 100}')
    starts = [
        {"start": 1, "job": "71", "restart_count": 0, "began": iso(4000), "step": 0},
        {
            "start": 1,
            "ended": iso(700),
            "step": 30,
            "code": 85,
            "cause": "time_limit",
            "action": "requeue",
            "reason": "the time limit was near",
        },
        {"start": 2, "job": "71", "restart_count": 1, "began": iso(600), "step": 30},
    ]
    write_lines(folder / "logs" / "starts.jsonl", starts)
    write_job(folder, new_record("slurm", "71"))
    return folder


def write_lines(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def state(folder: Path, job: QueuedJob | None = None, driver: Driver | None = None) -> tuple:
    return state_of(read_facts(folder), job, driver)


def queued(state: str, **more) -> QueuedJob:
    return QueuedJob("71", state, **more)


def test_the_files_of_a_run_are_read(run):
    facts = read_facts(run)
    assert (facts.step, facts.total_steps, facts.loss, facts.tokens_per_s) == (40, 100, 2.5, 5123)
    assert facts.left_s == 120
    first, second = read_starts(run)
    assert (first.ended, first.cause, second.ended, second.job) == (True, "time_limit", False, "71")


def test_finished_beats_all(run):
    (run / "FINISHED").write_text('{"reason": "early_stop", "step": 40}')
    seen = state(run, queued("RUNNING"), Driver(1, "node1"))
    assert seen == (RunState.finished, "ended early by its diagnosis")


@pytest.mark.parametrize(
    ("job", "expected"),
    [
        (queued("RUNNING"), RunState.running),
        (queued("COMPLETING"), RunState.running),
        (queued("SUSPENDED"), RunState.suspended),
        (queued("PENDING", reason="BeginTime", restarts=1), RunState.requeued),
        (queued("TIMEOUT"), RunState.failed),
        (queued("CANCELLED"), RunState.cancelled),
        (queued("COMPLETED"), RunState.failed),  # only FINISHED is success
        (None, RunState.ended),
    ],
)
def test_states_of_the_queue(run, job, expected):
    assert state(run, job)[0] is expected


def test_a_job_that_waits_says_why(run):
    assert state(run, queued("PENDING", reason="Resources"))[1] == "Resources"
    starts = run / "logs" / "starts.jsonl"
    ended = {"start": 2, "ended": iso(1), "reason": "a node failed", "cause": "node_failure"}
    starts.write_text(starts.read_text() + json.dumps(ended) + "\n")
    seen = state(run, queued("PENDING", reason="BeginTime"))
    assert seen == (RunState.requeued, "BeginTime; after: a node failed")
    for name in ("metrics.jsonl", "logs/starts.jsonl"):
        (run / name).unlink()
    assert state(run, queued("PENDING", reason="Priority")) == (RunState.pending, "Priority")


def test_a_start_that_has_logged_no_step_is_starting(run):
    os.utime(run / "metrics.jsonl", (time.time() - 900,) * 2)  # before the second start
    assert state(run, queued("RUNNING"))[0] is RunState.starting
    os.utime(run / "metrics.jsonl", (time.time() - 300,) * 2)
    assert state(run, queued("RUNNING"))[0] is RunState.running
    (run / "STOP").write_text("cancel")
    assert state(run, queued("RUNNING"))[0] is RunState.stopping


def test_a_run_that_was_gone_on_with_by_hand_is_running(run):
    seen = state(run, queued("COMPLETED"), Driver(4711, "login1"))
    assert seen == (RunState.running, "process 4711 on login1")


def test_why_it_failed(run):
    error = run / "logs" / "error.json"
    fields = error_fields(PosttrainError("has no text", where="rows.jsonl:7"), 3, "trace")
    error.write_text(json.dumps(fields))
    expected = (RunState.failed, "rank 3: rows.jsonl:7: has no text")
    assert state(run) == expected
    os.utime(error, (time.time() - 700,) * 2)  # of the first start
    assert state(run)[0] is RunState.ended
    (run / "logs" / "outcome.json").write_text('{"outcome": "stopped", "step": 40}')
    assert state(run)[0] is RunState.saved


def test_one_that_was_cancelled_before_it_began(run):
    for name in ("metrics.jsonl", "logs/starts.jsonl"):
        (run / name).unlink()
    assert state(run)[0] is RunState.ended
    (run / "STOP").write_text("cancel\n")
    assert state(run) == (RunState.cancelled, "by `posttrain cancel`")
    assert state(run, queued("PENDING", reason="Priority"))[0] is RunState.pending


def test_how_its_last_start_ended(run):
    starts = run / "logs" / "starts.jsonl"
    end = {"start": 2, "ended": iso(1), "cause": "failed", "reason": "3 starts without progress"}
    starts.write_text(starts.read_text() + json.dumps(end) + "\n{torn")
    assert state(run) == (RunState.failed, "3 starts without progress")


def test_what_the_table_has_of_a_run(run, tmp_path):
    (found,) = find_runs([], tmp_path / "outputs")
    job = queued("RUNNING", time_left_s=3720.0, restarts=3, nodes="node[1-2]")
    seen = status_of(found, {"71": job})
    assert (seen.run, seen.job, seen.nodes) == ("chat/20260101-120000", "71", "node[1-2]")
    assert (seen.run_left_s, seen.job_left_s, seen.restarts) == (120, 3720, 3)
    text = "\n".join(line.plain for line in table_lines(Survey([seen], ["Slurm is slow"]), 200))
    row = "chat/20260101-120000  71   running  40/100  2.5000      5.1k      2:00   1:02:00"
    assert text.splitlines()[1].startswith(row)
    assert text.endswith("note: Slurm is slow")
    (row,) = json.loads(table_json(Survey([seen])))["runs"]
    assert (row["state"], row["folder"], row["step"]) == ("running", str(run), 40)


def test_reasons_stand_below_where_the_terminal_is_narrow(run, tmp_path):
    (found,) = find_runs([str(run)], tmp_path / "outputs")
    seen = status_of(found, {"71": queued("PENDING", reason="ReqNodeNotAvail, Reserved")})
    wide = [line.plain for line in table_lines(Survey([seen]), 200)]
    assert wide[0].endswith("  reason")
    assert wide[1].endswith("  ReqNodeNotAvail, Reserved")
    narrow = [line.plain for line in table_lines(Survey([seen]), 100)]
    assert max(map(len, narrow)) <= 100
    assert narrow[2] == "    ReqNodeNotAvail, Reserved"
    small = [line.plain for line in table_lines(Survey([seen]), 78)]
    assert max(map(len, small)) <= 78
    assert small[0].endswith("  run left  restarts")  # no job left
    assert small[1].startswith("…")
    assert small[1].split()[0].endswith("01-120000")


def test_a_queue_that_is_silent_leaves_what_the_folders_say(run, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    seen = survey(find_runs([], tmp_path / "outputs"))
    assert [each.state for each in seen.runs] == [RunState.ended]
    (note,) = seen.notes
    assert "no squeue on this machine" in note


@pytest.mark.parametrize("word", ["71", "chat", "chat/20260101-120000", "{run}"])
def test_a_run_by_its_job_name_and_folder(word, run, tmp_path):
    (found,) = find_runs([word.format(run=run)], tmp_path / "outputs")
    assert found.folder == run


def test_names_are_those_below_the_root_from_wherever_it_is_named(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for words in ([], ["outputs/chat"], ["chat"], ["71"]):
        (found,) = find_runs(words, Path("outputs"))
        assert (found.name, found.folder) == ("chat/20260101-120000", run)


def test_tasks_of_an_array_and_the_whole(run, tmp_path):
    for task in range(2):
        folder = run.parent / f"task-{task}"
        folder.mkdir()
        (folder / "config.yaml").touch()
        (folder / "FINISHED").touch()
        write_job(folder, new_record("slurm", f"80_{task}"))
    root = tmp_path / "outputs"
    assert [each.name for each in find_runs(["80_1"], root)] == ["chat/task-1"]
    assert [each.name for each in find_runs(["80"], root)] == ["chat/task-0", "chat/task-1"]


def test_without_words_runs_without_a_job_that_are_finished_are_left_out(run, tmp_path):
    plain = run.parent / "plain"
    plain.mkdir()
    (plain / "config.yaml").touch()
    assert [each.folder for each in find_runs([], tmp_path / "outputs")] == [run]  # a dry run
    (plain / "metrics.jsonl").touch()
    names = [each.name for each in find_runs([], tmp_path / "outputs")]
    assert names == ["chat/20260101-120000", "chat/plain"]
    (plain / "FINISHED").touch()
    (run / "FINISHED").touch()
    assert [each.folder for each in find_runs([], tmp_path / "outputs")] == [run]


def test_what_is_no_run_names_what_there_is(run, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))  # no Slurm
    root = tmp_path / "outputs"
    with pytest.raises(PosttrainError, match=r"are: chat/20260101-120000"):
        find_runs(["chat/20260101-12000"], root)
    with pytest.raises(PosttrainError, match=r"there is no folder .*elsewhere: give --root"):
        find_runs(["chat"], tmp_path / "elsewhere")
    with pytest.raises(PosttrainError, match=re.escape("72: is the job of no run below")) as caught:
        find_runs(["72"], root)
    assert not isinstance(caught.value, ClusterError)
    assert "no scontrol on this machine" in str(caught.value)
