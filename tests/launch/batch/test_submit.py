"""The Slurm job script. That it works is shown by tests/slurm on a real Slurm."""

import os
import signal
import subprocess
import time

import pytest
from posttrain_launch.batch.job_script import render
from posttrain_launch.batch.submit import submit

from posttrain_dist.config import Ray, RunConfig, Slurm, complete
from posttrain_dist.errors import ClusterError, ConfigError


def slurm_run(**fields) -> RunConfig:
    return complete(RunConfig(name="mine", cluster=Slurm(**fields)))


# Stand-ins for srun and scontrol: the shortest time limit of a real Slurm is a minute, and here
# only the script's own decision is looked at. tests/slurm runs the script on a real one.
SRUN = """#!/bin/bash
case "$*" in
*"posttrain run"*)
  trap '[ -z "$SAVES" ] || { mkdir -p "$SAVES" && touch "$SAVES/MANIFEST.json"; }; exit 130' USR1
  touch "$POSTTRAIN_RUN/ready"
  while sleep 0.02; do :; done ;;
*kill-on-bad-exit*) exec sleep 60 ;;
esac
"""
SCONTROL = """#!/bin/bash
case "$1" in
show) echo node1 ;;
requeue) echo "$2" >>"$POSTTRAIN_RUN/requeued" ;;
esac
"""


@pytest.mark.parametrize(
    ("saves", "requeued"),
    [("step-000007", True), ("", False), ("step-000007.partial", False)],
    ids=["saved", "saved nothing", "did not come to the end of saving"],
)
def test_a_job_goes_back_into_the_queue_only_after_progress(saves, requeued, tmp_path):
    run_folder, programs = tmp_path / "run", tmp_path / "bin"
    older = run_folder / "checkpoints" / "step-000003" / "MANIFEST.json"  # of an earlier start
    older.parent.mkdir(parents=True)
    older.touch()
    os.utime(older, (1000, 1000))
    programs.mkdir()
    for name, text in {"srun": SRUN, "scontrol": SCONTROL}.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    script = tmp_path / "job.sbatch"
    script.write_text(render(slurm_run(preflight=False), run_folder))
    environment = {
        **os.environ,
        "SLURM_JOB_ID": "17",
        "SLURM_JOB_NODELIST": "node1",
        "SLURM_CPUS_PER_TASK": "1",
        "SAVES": str(run_folder / "checkpoints" / saves) if saves else "",
    }
    # The script puts the folder of `posttrain` first; the stand-ins are not there.
    environment["PATH"] = f"{programs}:{environment['PATH']}"
    job = subprocess.Popen(["bash", script], env=environment, stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 30
    while not (run_folder / "ready").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    job.send_signal(signal.SIGUSR1)
    said, _ = job.communicate(timeout=30)
    assert job.returncode == 130
    assert (run_folder / "requeued").exists() is requeued
    assert ("back into the queue" in said) is requeued
    assert ("not queued again" in said) is not requeued


def test_a_dry_run_prints_the_script_and_submits_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PATH", "")  # no sbatch, and none is missed
    assert submit(slurm_run(nodes=2), tmp_path, dry_run=True) is None
    script = tmp_path / "job.sbatch"
    printed = capsys.readouterr().out
    assert printed.startswith(script.read_text())
    assert str(script) in printed.splitlines()[-1]
    assert "#SBATCH --nodes=2" in printed


def test_a_machine_without_slurm_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ClusterError) as failure:
        submit(slurm_run(), tmp_path)
    assert "no sbatch" in failure.value.what
    assert str(tmp_path / "job.sbatch") in failure.value.fix


def test_another_cluster_is_refused(tmp_path):
    with pytest.raises(ConfigError) as failure:
        submit(complete(RunConfig(cluster=Ray())), tmp_path)
    assert failure.value.where == "cluster"
    assert not list(tmp_path.iterdir())
