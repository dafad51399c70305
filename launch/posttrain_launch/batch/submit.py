"""`posttrain submit`: write the Slurm job of a frozen run, and send it."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

from posttrain_dist.config import RunConfig, Slurm
from posttrain_dist.errors import ClusterError, ConfigError
from posttrain_dist.files import write_atomic
from posttrain_launch.batch.follow import job_state
from posttrain_launch.batch.job_options import resources
from posttrain_launch.batch.job_script import render
from posttrain_launch.batch.refusals import cure_of
from posttrain_launch.run.job_record import new_record, read_job, write_job

_OF_SITE = ("SLURM_CONF", "SLURM_CLUSTERS", "SLURM_JWT")


def submit(config: RunConfig, run_folder: Path, dry_run: bool = False) -> str | None:
    """Write `job.sbatch` into the run folder and submit it, or only print it.

    Args:
        config: the frozen run; `config.cluster` is Slurm.
        run_folder: holds config.yaml; on a file system that all nodes see.
        dry_run: print the script and submit nothing.

    Returns:
        The job's id; None for a dry run.

    Raises:
        ConfigError: the run is not one for Slurm.
        ClusterError: there is no sbatch here, or it refuses the job, or a job drives the run.
    """
    if not isinstance(config.cluster, Slurm):
        raise ConfigError(
            "a job is submitted to Slurm, and this run is not set up for it",
            where="cluster",
            fix="add cluster=slurm and, for instance, cluster.nodes=2",
        )
    script = run_folder / "job.sbatch"
    text = render(config, run_folder)
    if not dry_run:
        refuse_second_job(run_folder)
    write_atomic(script, text)
    script.chmod(0o755)
    (run_folder / "logs").mkdir(exist_ok=True)  # Slurm opens its log there before the job begins
    if dry_run:
        print(text)
        print(f"# dry run, nothing submitted; the script is {script}")
        return None
    job_id = sbatch(script)
    write_job(run_folder, new_record("slurm", job_id))
    print(f"submitted job {job_id}")
    print(f"  asks for:  {resources(config.cluster)}")
    named = shlex.quote(str(run_folder))
    print(f"  state:     posttrain status {named}")
    print(f"  progress:  posttrain logs {named} --follow")
    print(f"  cancel:    posttrain cancel {named}  (saves first)")
    print(f"  run:       {run_folder}  (done when it holds FINISHED)", flush=True)
    return job_id


def refuse_second_job(run_folder: Path) -> None:
    """Refuse a run that a job drives already, or is going to.

    Raises:
        ClusterError: it does.
    """
    record = read_job(run_folder)
    if record is None or record.system != "slurm" or shutil.which("squeue") is None:
        return
    state = job_state(record.id)
    if state.is_live:
        raise ClusterError(
            f"job {record.id} drives this run already: {state.state}",
            where=str(run_folder),
            fix=f"wait for it, or end it: posttrain cancel {shlex.quote(str(run_folder))}",
        )


def sbatch(script: Path) -> str:
    """Submit a job script; the id of the job.

    Raises:
        ClusterError: there is no sbatch here, or it refuses the job.
    """
    program = shutil.which("sbatch")
    if program is None:
        raise ClusterError(
            "there is no sbatch on this machine",
            where="cluster",
            fix=f"submit on a login node of the cluster: sbatch {script}",
        )
    done = subprocess.run(
        [program, "--parsable", str(script)],
        capture_output=True,
        text=True,
        check=False,
        encoding="utf-8",
        env=login_environment(os.environ),
    )
    if done.returncode != 0:
        answer = (done.stderr or done.stdout).strip().replace("\n", "; ")
        cure = cure_of(answer)
        raise ClusterError(
            f"sbatch refused the job: {answer}",
            where=cure.key,
            fix=f"{cure.fix}; the script is {script}",
        )
    return done.stdout.strip().split(";")[0]  # "id" or "id;cluster"


def login_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment without what Slurm set of the job that we are in ourselves.

    From an interactive job (salloc, srun --pty) its sizes would reach the new job's steps.
    """
    if "SLURM_JOB_ID" not in environment:
        return dict(environment)
    return {
        name: value
        for name, value in environment.items()
        if name in _OF_SITE or not name.startswith(("SLURM_", "SLURMD_", "SBATCH_"))
    }
