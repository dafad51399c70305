"""The Slurm job script. That it works is shown by tests/slurm on a real Slurm."""

import pytest
from posttrain_launch.batch.submit import login_environment, submit

from posttrain_dist.config import Ray, RunConfig, Slurm, complete
from posttrain_dist.errors import ClusterError, ConfigError


def slurm_run(**fields) -> RunConfig:
    return complete(RunConfig(name="mine", cluster=Slurm(**fields)))


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


def test_a_job_that_is_submitted_from_a_job_has_none_of_its_sizes():
    site = {"PATH": "/bin", "SLURM_CONF": "/etc/slurm.conf", "WANDB_MODE": "offline"}
    job = {"SLURM_JOB_ID": "7", "SLURM_MEM_PER_CPU": "100", "SLURMD_NODENAME": "n1"}
    assert login_environment({**site, **job}) == site
    own = {**site, "SLURM_TIME_FORMAT": "relative", "SBATCH_ACCOUNT": "lab"}
    assert login_environment(own) == own
