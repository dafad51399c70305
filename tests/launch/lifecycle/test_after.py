"""What a job script is told to do when its driver has ended."""

import pytest
from posttrain_launch.lifecycle import after, starts
from posttrain_launch.lifecycle.decide import Cause

from posttrain_dist.config import RunConfig, Slurm, complete

# As `scontrol show job -o` of Slurm 22.05 prints it.
RUNNING = "JobId=5 JobState=RUNNING Reason=None Requeue=1 Restarts=0 PreemptTime=None ExitCode=0:0"


def state(**changes: str) -> str:
    fields = dict(word.split("=", 1) for word in RUNNING.split()) | changes
    return " ".join(f"{key}={value}" for key, value in fields.items())


CASES = {
    "the driver knows best": ({"written": Cause.time_limit, "code": 85}, Cause.time_limit),
    "an error": ({"written": Cause.failed, "code": 1}, Cause.failed),
    "a person": ({"written": Cause.stopped, "code": 130, "signal": "TERM"}, Cause.stopped),
    "scancel": (
        {"written": None, "code": 137, "signal": "TERM", "state": state(JobState="CANCELLED")},
        Cause.stopped,
    ),
    "scancel that the driver took for a preemption": (
        {"written": Cause.preempted, "code": 85, "state": state(JobState="CANCELLED")},
        Cause.stopped,
    ),
    "scontrol requeue, or a node that went down": (
        {"written": None, "code": 137, "signal": "TERM", "state": state(Restarts="1")},
        Cause.requeued,
    ),
    "the second start of a job": (
        {"written": Cause.time_limit, "code": 85, "restart_count": 1, "state": state(Restarts="1")},
        Cause.time_limit,
    ),
    "preemption": (
        {"written": Cause.preempted, "code": 85, "state": state(PreemptTime="2027-01-31T11:00:00")},
        Cause.preempted,
    ),
    "preemption, and it did not save in time": (
        {"written": None, "code": 143, "state": state(PreemptTime="2027-01-31T11:00:00")},
        Cause.preempted,
    ),
    "TERM of which Slurm says nothing": (
        {"written": Cause.preempted, "code": 85, "state": ""},
        Cause.time_limit,
    ),
    "Ray's head is gone": ({"written": None, "code": 137, "ray_ended": True}, Cause.ray_lost),
    "Ray is gone, and the driver took it for an error": (
        {"written": Cause.failed, "code": 1, "ray_ended": True},
        Cause.ray_lost,
    ),
    "a lost node that the driver saw": ({"written": Cause.ray_lost, "code": 75}, Cause.ray_lost),
    "killed while it saved": ({"written": None, "code": 137, "signal": "USR1"}, Cause.time_limit),
    "killed": ({"written": None, "code": 137}, Cause.killed),
    "no such command": ({"written": None, "code": 127}, Cause.failed),
    "it did not come so far": ({"written": None, "code": 1}, Cause.failed),
}


@pytest.mark.parametrize("name", CASES)
def test_the_cause_is_what_most_is_known_of(name):
    given, cause = CASES[name]
    known = {"state": RUNNING, **given}
    assert after.cause_in_slurm(known.pop("written"), known.pop("code"), **known) is cause


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "5")
    monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)
    (tmp_path / "logs").mkdir()
    write_config(tmp_path)
    return tmp_path


def write_config(folder, **fields):
    config = complete(RunConfig(cluster=Slurm(**fields)))
    (folder / "config.yaml").write_text(config.to_yaml())


def decided(folder, capsys, *words):
    after.main([str(folder), *words])
    said = capsys.readouterr()
    return said.out.split(), said.err.strip()


def test_the_script_reads_one_line(folder, capsys):
    starts.begin(folder, starts.this_job())
    line, reason = decided(folder, capsys, "--code", "137", "--ray-ended", "--state", RUNNING)
    assert line == ["requeue", "75"]
    assert reason == "Ray lost a machine that the run needs"
    [row] = starts.read(folder)
    assert (row["cause"], row["code"], row["action"]) == ("ray_lost", 137, "requeue")


def test_a_driver_that_never_came_so_far_has_a_start_too(folder, capsys):
    assert decided(folder, capsys, "--code", "137")[0] == ["requeue", "75"]
    [row] = starts.read(folder)
    assert (row["job"], row["cause"]) == ("5", "killed")


def test_the_third_start_without_progress_is_the_last(folder, capsys, monkeypatch):
    lines = []
    for count in range(3):
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(count))
        starts.begin(folder, starts.this_job())
        lines.append(decided(folder, capsys, "--code", "137", "--signal", "USR1"))
    assert [line for line, _ in lines] == [["requeue", "85"], ["requeue", "85"], ["end", "1"]]
    assert "3 starts in a row without progress" in lines[-1][1]


def test_finished_is_what_the_folder_says(folder, capsys):
    (folder / "FINISHED").touch()
    # Whatever befell the processes after that.
    assert decided(folder, capsys, "--code", "137", "--ray-ended")[0] == ["end", "0"]


def test_a_site_that_forbids_it_queues_nothing_again(folder, capsys):
    write_config(folder, requeue=False)
    line, reason = decided(folder, capsys, "--code", "75")
    assert line == ["end", "75"]
    assert "not to be queued again" in reason
