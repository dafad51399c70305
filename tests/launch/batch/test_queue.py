"""What the programs of Slurm print, read: forms that their manuals and a Slurm 22.05 show."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from posttrain_launch.batch import queue

from posttrain_dist.errors import ClusterError


@pytest.fixture
def programs(tmp_path, monkeypatch):
    """programs(name, script): a program on a PATH that holds nothing else of Slurm."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}/usr/local/nowhere")

    def add(name: str, script: str) -> Path:
        path = folder / name
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        return path

    return add


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("4:57", 297),
        ("1:02:03", 3723),
        ("2-00:00:10", 172_810),
        ("0:00", 0),
        ("UNLIMITED", None),
        ("NOT_SET", None),
        ("N/A", None),
        ("", None),
    ],
)
def test_times_of_slurm(text, expected):
    assert queue.seconds(text) == expected


def test_jobs_that_left_the_queue_are_read_from_the_accounting(programs):
    programs(
        "squeue",
        r"printf '7_1  |RUNNING  |None  |1-02:00:00  |2  |node[1-2]  |\n'",
    )
    programs(
        "sacct",
        r"""printf '5|CANCELLED by 1000|node1\n6|TIMEOUT|node[1-2]\n5.batch|CANCELLED|node1\n'""",
    )
    jobs = queue.read_queue(["5", "6", "7_1", "8"])
    assert sorted(jobs) == ["5", "6", "7_1"]
    assert [jobs[key].state for key in sorted(jobs)] == ["CANCELLED", "TIMEOUT", "RUNNING"]
    assert [jobs[key].is_live for key in sorted(jobs)] == [False, False, True]
    assert jobs["7_1"].time_left_s == 26 * 3600
    assert jobs["7_1"].restarts == 2
    assert jobs["7_1"].reason == ""


def test_a_single_job_that_slurm_forgot_is_none(programs):
    programs("squeue", "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1")
    programs("sacct", "echo 'Slurm accounting storage is disabled' >&2; exit 1")
    assert queue.read_queue(["5"]) == {}


def test_without_slurm_it_says_so(programs):
    with pytest.raises(ClusterError, match="there is no squeue on this machine"):
        queue.read_queue(["5"])
    assert queue.read_queue([]) == {}


def test_a_controller_that_hangs_is_not_waited_for(programs, monkeypatch):
    monkeypatch.setattr(queue, "DEADLINE_S", 0.2)
    programs("squeue", "exec /bin/sleep 60")
    with pytest.raises(ClusterError, match=r"no answer within 0\.2 s"):
        queue.read_queue(["5"])


def test_a_controller_that_is_down_is_named_by_its_last_line(programs):
    programs(
        "squeue",
        "echo 'squeue: error: retrying' >&2\n"
        "echo 'slurm_load_jobs error: Unable to contact slurm controller' >&2\nexit 1",
    )
    with pytest.raises(ClusterError) as caught:
        queue.read_queue(["5"])
    assert "Unable to contact slurm controller" in caught.value.what
    assert "retrying" not in caught.value.what


@pytest.mark.parametrize(
    ("answer", "code", "refused"),
    [
        ("scancel: error: Kill job error on job id 5: Access/permission denied", 1, "refuses"),
        ("scancel: error: Kill job error on job id 5: Access/permission denied", 0, "refuses"),
        ("slurm_kill_job2 error: Unable to contact slurm controller", 1, "does not answer"),
        ("scancel: error: Kill job error on job id 5: Invalid job id specified", 1, None),
        ("Job/step already completing or completed", 1, None),
    ],
)
def test_how_scancel_answers(programs, answer, code, refused):
    programs("scancel", f"echo '{answer}' >&2; exit {code}")
    if refused is None:
        queue.cancel_job("5")
        return
    with pytest.raises(ClusterError, match=refused):
        queue.cancel_job("5")
