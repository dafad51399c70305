"""The shell of a job: what it passes on, and that it queues a job again once. Slurm's programs are
stand-ins, for the shortest time limit of a real Slurm is a minute; tests/slurm has a real one."""

import os
import signal
import subprocess
import time

import pytest
from posttrain_launch.batch.job_script import render
from posttrain_launch.lifecycle import starts

from posttrain_dist.config import RunConfig, Slurm, complete

# The driver is `posttrain run`; the step of Ray is the one that a lost node ends.
SRUN = """#!/bin/bash
case "$*" in
*"posttrain run"*)
  trap 'exit $CODE' USR1
  touch "$POSTTRAIN_RUN/ready"
  while sleep 0.02; do :; done ;;
*kill-on-bad-exit*)
  echo 10.0.0.1:20000 >"$POSTTRAIN_HEAD_FILE"
  [ -z "$RAY_ENDS" ] || exit 1
  exec sleep 60 ;;
esac
"""
SCONTROL = """#!/bin/bash
case "$1 $2" in
"show hostnames") echo node1 ;;
"show job") echo "$STATE" ;;
requeue*) echo "$2" >>"$POSTTRAIN_RUN/requeued"; kill -TERM $PPID ;;
esac
"""
SQUEUE = "#!/bin/bash\necho 2027-01-31T12:00:00\n"


@pytest.fixture
def start(tmp_path):
    """Starts a job of a run, whose driver is ready on return; the process and the run folder."""
    run_folder, programs = tmp_path / "run", tmp_path / "bin"
    (run_folder / "logs").mkdir(parents=True)
    programs.mkdir()
    for name, text in {"srun": SRUN, "scontrol": SCONTROL, "squeue": SQUEUE}.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    config = complete(RunConfig(name="mine", cluster=Slurm(preflight=False)))
    (run_folder / "config.yaml").write_text(config.to_yaml())
    script = tmp_path / "job.sbatch"

    def started(**variables: str) -> subprocess.Popen[str]:
        text = render(config, run_folder)
        if broken := variables.pop("wrap", ""):
            text = text.replace("wrap=()", f"wrap=({broken})")
        script.write_text(text)
        environment = {
            **os.environ,
            "SLURM_JOB_ID": "17",
            "SLURM_JOB_NODELIST": "node1",
            "SLURM_CPUS_PER_TASK": "1",
            "TMPDIR": str(tmp_path),
            "CODE": "85",
            "STATE": "JobState=RUNNING Restarts=0",
            "RAY_ENDS": "",
            **variables,
        }
        # The script puts the folder of `posttrain` first; the stand-ins are not there.
        environment["PATH"] = f"{programs}:{environment['PATH']}"
        job = subprocess.Popen(["bash", script], env=environment, stdout=subprocess.PIPE, text=True)
        deadline = time.monotonic() + 30
        while not (run_folder / "ready").exists() and not variables.get("RAY_ENDS"):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        return job

    return started, run_folder


def requeued(run_folder):
    path = run_folder / "requeued"
    return path.read_text().split() if path.exists() else []


@pytest.mark.parametrize(
    ("driver_code", "job_code", "ids"),
    [(85, 85, ["17"]), (75, 75, ["17"]), (130, 130, []), (2, 2, []), (0, 1, [])],
)
def test_the_drivers_code_decides_whether_a_job_is_queued_again(driver_code, job_code, ids, start):
    started, run_folder = start
    job = started(CODE=str(driver_code))
    job.send_signal(signal.SIGUSR1)
    said, _ = job.communicate(timeout=20)
    assert job.returncode == job_code, said
    assert requeued(run_folder) == ids
    assert "USR1: the time limit is near" in said
    [row] = starts.read(run_folder)
    assert (row["job"], row["code"], row["action"] == "requeue") == ("17", driver_code, bool(ids))
    assert not [path.name for path in (run_folder / "ray").iterdir()]  # no token is left, nor else


def test_a_preempted_job_waits_for_slurm(start):
    started, run_folder = start
    job = started(STATE="JobState=RUNNING Restarts=0 PreemptTime=2027-01-31T11:00:00")
    job.send_signal(signal.SIGUSR1)
    with pytest.raises(subprocess.TimeoutExpired):
        job.communicate(timeout=3)
    assert starts.read(run_folder)[0]["action"] == "wait"
    job.send_signal(signal.SIGTERM)
    job.communicate(timeout=20)
    assert job.returncode == 85
    assert requeued(run_folder) == []


def test_a_lost_ray_is_queued_again(start):
    started, run_folder = start
    job = started(RAY_ENDS="1")
    said, _ = job.communicate(timeout=20)
    assert job.returncode == 75
    assert "Ray ended first" in said
    assert requeued(run_folder) == ["17"]


def test_where_python_cannot_run_the_drivers_code_decides(start):
    started, run_folder = start
    job = started(wrap="false", CODE="85")
    job.send_signal(signal.SIGUSR1)
    job.communicate(timeout=20)
    assert (job.returncode, requeued(run_folder)) == (85, ["17"])
    (run_folder / "ready").unlink()
    job = started(wrap="false", CODE="1")
    job.send_signal(signal.SIGUSR1)
    job.communicate(timeout=20)
    assert (job.returncode, requeued(run_folder)) == (1, ["17"])
