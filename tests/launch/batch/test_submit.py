"""The Slurm job script. That it works is shown by tests/slurm on a real Slurm."""

import shutil
import subprocess
from pathlib import Path

import pytest
from posttrain_launch.batch.job_script import render
from posttrain_launch.batch.submit import submit

from posttrain_dist.config import Ray, RunConfig, Slurm, complete
from posttrain_dist.errors import ClusterError, ConfigError


def slurm_run(**fields) -> RunConfig:
    return complete(RunConfig(name="mine", cluster=Slurm(**fields)))


def header(text: str) -> list[str]:
    """The lines that Slurm reads: up to the first command."""
    lines = text.splitlines()
    return [line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH ")]


def test_the_header_holds_what_the_config_asks_for():
    run = slurm_run(
        nodes=3,
        gpus_per_node=4,
        cpus_per_node=16,
        memory_per_node="64G",
        partition="gpu",
        account="lab",
        time="2-00:00:00",
        extra=["--qos=high", "--exclude=node[7-8]"],
    )
    assert header(render(run, Path("/data/50% done/run"))) == [
        "--job-name=mine",
        "--nodes=3",
        "--ntasks-per-node=1",
        "--cpus-per-task=16",
        "--gpus-per-node=4",
        "--mem=64G",
        "--time=2-00:00:00",
        "--partition=gpu",
        "--account=lab",
        '--chdir="/data/50% done/run"',
        '--output="/data/50%% done/run/logs/slurm-%j.log"',
        "--open-mode=append",
        "--signal=B:USR1@120",
        "--requeue",
        "--qos=high",
        "--exclude=node[7-8]",
    ]


def test_the_script_says_how_long_there_is_to_save():
    text = render(slurm_run(extra=["--signal=B:USR1@600"]), Path("/runs/a"))
    assert "\n# 120 s before the time limit the run saves" in text
    # Slurm takes the last of several: the user's own.
    signals = [line for line in header(text) if line.startswith("--signal")]
    assert signals == ["--signal=B:USR1@120", "--signal=B:USR1@600"]


def test_what_is_not_set_is_left_to_the_cluster():
    keys = {line.partition("=")[0] for line in header(render(slurm_run(), Path("/runs/a")))}
    assert keys.isdisjoint({"--mem", "--partition", "--account", "--gpus-per-node", "--time"})


@pytest.mark.parametrize(
    ("fields", "cpus"),
    [({}, 2), ({"gpus_per_node": 8}, 32), ({"gpus_per_node": 8, "cpus_per_worker": 6.5}, 52),
     ({"gpus_per_node": 8, "cpus_per_node": 9}, 9)],
)  # fmt: skip
def test_a_node_has_cpus_for_each_of_its_workers(fields, cpus):
    assert f"--cpus-per-task={cpus}" in header(render(slurm_run(**fields), Path("/runs/a")))


@pytest.mark.parametrize("time", ["30", "28800", "1:2:3:4", "an hour", "", "1h"])
def test_a_time_that_slurm_would_read_as_another_is_refused(time):
    with pytest.raises(ConfigError, match="hours:minutes:seconds") as refused:
        slurm_run(time=time)
    assert refused.value.where == "cluster.time"


@pytest.mark.parametrize("time", ["30:00", "08:00:00", "120:00:00", "2-00", "2-12:30", "2-0:0:0"])
def test_the_times_of_slurm_are_taken(time):
    assert f"--time={time}" in header(render(slurm_run(time=time), Path("/runs/a")))


def test_paths_reach_the_shell_as_they_are(tmp_path):
    folder = tmp_path / 'it\'s $HOME "and" `more`'
    text = render(slurm_run(network_interface="ib0"), folder)
    variables = text[: text.index("# What every process")]
    ask = (
        variables + '\nprintf "%s\\n" "$POSTTRAIN_RUN" "$POSTTRAIN_INTERFACE"; ls "$POSTTRAIN_BIN"'
    )
    said = subprocess.run(["bash", "-c", ask], capture_output=True, text=True, check=True).stdout
    run_folder, interface, *programs = said.splitlines()
    assert run_folder == str(folder)
    assert interface == "ib0"
    assert {"posttrain", "ray"} <= set(programs)


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_the_script_is_clean_shell(tmp_path):
    script = tmp_path / "job.sbatch"
    script.write_text(render(slurm_run(), tmp_path))
    done = subprocess.run(["shellcheck", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


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
