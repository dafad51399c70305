"""A sweep whose driver is killed, at each point at which something else is on the disk."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from posttrain_launch.sweep.folder import Sweep, read_trials, trial_folder, write_sweep
from ray_runs import wait_until

from posttrain_dist.files import read_rows

DRIVER = Path(__file__).parents[2] / "workers" / "drive_imitated.py"


def make(tmp_path: Path, *trials: list[str]) -> Path:
    folder = tmp_path / "sweep"
    search = {"kind": "basic", "trials": list(trials)}
    write_sweep(Sweep(folder=folder, name="s", command="c", created="t", cwd="/", search=search))
    return folder


def drive(folder: Path, point: str = "none") -> tuple[int, dict[str, str]]:
    command = [sys.executable, str(DRIVER), str(folder), point]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert not done.stderr, done.stderr
    return done.returncode, json.loads(done.stdout.splitlines()[-1]) if point == "none" else {}


def steps(trial: Path) -> list[int]:
    return [row["step"] for row in read_rows(trial / "metrics.jsonl")]


def test_no_trial_is_lost_and_none_runs_twice_wherever_the_driver_dies(tmp_path):
    folder = make(tmp_path, ["lr=1"], ["lr=2"], ["lr=3"])
    for point in ("line", "torn", "partial", "frozen", "middle", "finished"):
        assert drive(folder, point)[0] == -signal.SIGKILL, point
    code, states = drive(folder)
    assert (code, states) == (0, {"0": "done", "1": "done", "2": "done"})
    trials = read_trials(folder)
    assert [(trial.number, trial.overrides) for trial in trials] == [
        (0, ("lr=1",)),
        (1, ("lr=2",)),
        (2, ("lr=3",)),
    ]
    for trial in trials:
        assert steps(trial.folder) == [1, 2, 3, 4, 5, 6]
        assert (trial.folder / "starts").read_text() == "start\n"  # the driver's death ends none
    # Once it is done nothing more is begun.
    assert drive(folder)[0] == 0
    assert (trial_folder(folder, 0) / "starts").read_text() == "start\n"


def test_a_trial_that_died_with_its_driver_goes_on_from_where_it_was(tmp_path):
    folder = make(tmp_path, ["lr=1", "steps=40"], ["lr=2"])
    command = [sys.executable, str(DRIVER), str(folder), "middle"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.wait(60) == -signal.SIGKILL
    first = trial_folder(folder, 0)
    [trial_pid] = pids_of(first)
    os.kill(trial_pid, signal.SIGKILL)
    wait_until(lambda: not pids_of(first), timeout_s=10)
    assert 3 <= len(steps(first)) < 40
    assert drive(folder) == (0, {"0": "done", "1": "done"})
    assert steps(first) == list(range(1, 41))
    assert (first / "starts").read_text() == "start\nstart\n"


def pids_of(folder: Path) -> list[int]:
    """Processes that were given the folder, the driver of the sweep left out."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = entry.read_bytes().split(b"\0")
        except OSError:
            continue
        if str(folder).encode() in words:
            found.append(int(entry.parent.name))
    return found


@pytest.mark.slow
def test_two_drivers_of_one_sweep(tmp_path):
    folder = make(tmp_path, ["lr=1", "steps=30"])
    command = [sys.executable, str(DRIVER), str(folder), "none"]
    first = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        wait_until(lambda: steps(trial_folder(folder, 0)), timeout_s=30)
        second = subprocess.run(command, capture_output=True, text=True, timeout=30)
        assert second.returncode == 1
        assert "another process drives this sweep" in second.stderr
        assert first.wait(60) == 0
    finally:
        first.kill()
    assert steps(trial_folder(folder, 0)) == list(range(1, 31))


@pytest.mark.slow
def test_a_signal_has_the_trial_save_and_the_sweep_goes_on_later(tmp_path):
    folder = make(tmp_path, ["lr=1", "steps=30"], ["lr=2"])
    command = [sys.executable, str(DRIVER), str(folder), "none"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        wait_until(lambda: len(steps(trial_folder(folder, 0))) > 3, timeout_s=30)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 1
    finally:
        process.kill()
    states = json.loads(process.stdout.read().splitlines()[-1])
    assert states == {"0": "stopped"}
    assert len(steps(trial_folder(folder, 0))) < 30
    assert drive(folder) == (0, {"0": "done", "1": "done"})
    assert steps(trial_folder(folder, 0)) == list(range(1, 31))


def test_a_trial_is_started_again_if_its_exit_code_says_so_and_the_sweep_goes_on(tmp_path):
    cases = [
        (["fails=75", "recovers=1"], 2, "done"),  # its machines failed
        (["fails=85", "recovers=1"], 2, "done"),  # it saved before a time limit
        (["fails=75"], 2, "failed"),  # once and no more
        (["fails=2", "recovers=1"], 1, "failed"),
        ([], 1, "done"),
    ]
    trials = [[f"lr={n + 1}", "steps=2", *given] for n, (given, _, _) in enumerate(cases)]
    folder = make(tmp_path, *trials)
    for _ in range(2):  # the second time those that failed stay so
        states = {str(n): state for n, (_, _, state) in enumerate(cases)}
        assert drive(folder) == (1, states)
        for number, (_, starts, _) in enumerate(cases):
            trial = trial_folder(folder, number)
            assert (trial / "starts").read_text() == "start\n" * starts
            assert steps(trial) == [1, 2]
    assert json.loads((trial_folder(folder, 3) / "failed.json").read_text()) == {"code": 2}
