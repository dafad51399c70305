"""config.cluster as the options of a job: what is asked for, and what Slurm would misread."""

import json
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
from posttrain_launch.batch.container import mounts
from posttrain_launch.batch.job_options import options, signal_lead
from posttrain_launch.batch.job_script import render

from posttrain_dist.config import Hardware, ModelConfig, RunConfig, Slurm, complete
from posttrain_dist.config.cluster import ContainerRuntime, GpuRequest
from posttrain_dist.config.job_rules import time_limit_s
from posttrain_dist.errors import ConfigError


def slurm_run(**fields) -> RunConfig:
    return complete(RunConfig(name="mine", cluster=Slurm(**fields)))


def header(text: str) -> list[str]:
    """The lines that Slurm reads: up to the first command."""
    lines = text.splitlines()
    return [line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH ")]


def given(run: RunConfig, folder: str = "/runs/a") -> dict[str, str]:
    pairs = [line.partition("=") for line in header(render(run, Path(folder)))]
    return {key.removeprefix("--"): value for key, _, value in pairs}


def test_the_header_holds_what_the_config_asks_for():
    run = slurm_run(
        nodes=3,
        gpus_per_node=4,
        cpus_per_node=16,
        memory_per_node="64G",
        partition="gpu",
        account="lab",
        time="2-00:00:00",
        extra=["--nice=100"],
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
        "--nice=100",
    ]


def test_what_is_not_set_is_left_to_the_cluster():
    keys = {line.partition("=")[0] for line in header(render(slurm_run(), Path("/runs/a")))}
    assert keys == {
        *("--job-name", "--nodes", "--ntasks-per-node", "--cpus-per-task", "--chdir", "--output"),
        *("--open-mode", "--signal", "--requeue"),
    }


@pytest.mark.parametrize(
    ("fields", "cpus"),
    [({}, 2), ({"gpus_per_node": 8}, 32), ({"gpus_per_node": 8, "cpus_per_worker": 6.5}, 52),
     ({"gpus_per_node": 8, "cpus_per_node": 9}, 9)],
)  # fmt: skip
def test_a_node_has_cpus_for_each_of_its_workers(fields, cpus):
    assert f"--cpus-per-task={cpus}" in header(render(slurm_run(**fields), Path("/runs/a")))


@pytest.mark.parametrize(
    ("fields", "asked"),
    [({"gpus_per_node": 8}, "gpus-per-node=8"),
     ({"gpus_per_node": 8, "gpu_type": "h100"}, "gpus-per-node=h100:8"),
     ({"gpus_per_node": 8, "gpu_request": GpuRequest.gres}, "gres=gpu:8"),
     ({"gpus_per_node": 2, "gpu_request": GpuRequest.gres, "gpu_type": "a100"}, "gres=gpu:a100:2")],
)  # fmt: skip
def test_gpus_are_asked_for_as_the_site_wants_it(fields, asked):
    lines = header(render(slurm_run(**fields), Path("/runs/a")))
    assert [line for line in lines if "gpu" in line] == [f"--{asked}"]
    assert not [
        line for line in header(render(slurm_run(gpus_per_node=0), Path("/r"))) if "g=" in line
    ]


def test_a_folder_is_quoted_as_sbatch_reads_it():
    """Tried on 22.05: sbatch takes quotes off, and a `#` outside of them ends the line."""
    found = given(slurm_run(), "/runs/a b\"c'd#e")
    assert found["chdir"] == '"/runs/a b\\"c\'d#e"'
    assert given(slurm_run(), "/runs/x%j")["output"] == "/runs/x%%j/logs/slurm-%j.log"


def test_an_array_changes_options_by_name():
    cluster = complete(RunConfig(cluster=Slurm(requeue=False))).cluster
    found = options(
        "s", cluster, Path("/s"), changes={"array": "0-5%2", "output": "/s/%A_%a", "signal": None}
    )
    assert "--array=0-5%2" in found and "--output=/s/%A_%a" in found
    assert "--no-requeue" in found
    assert not [each for each in found if each.startswith(("--signal", "--requeue"))]


@pytest.mark.parametrize(
    "time", ["30", "28800", "1:2:3:4", "an hour", "", "1h", "1:60:00", "99:99:99", "1-25"]
)
def test_a_time_that_slurm_would_read_as_another_is_refused(time):
    with pytest.raises(ConfigError, match="hours:minutes:seconds") as refused:
        slurm_run(time=time)
    assert refused.value.where == "cluster.time"


def test_a_time_in_which_nothing_can_be_trained_is_refused():
    with pytest.raises(ConfigError, match="2 minutes or more") as refused:
        slurm_run(time="00:01:59")
    assert refused.value.where == "cluster.time"


@pytest.mark.parametrize(
    ("time", "seconds"),
    [("30:00", 1800), ("08:00:00", 28800), ("120:00:00", 432_000), ("2-00", 172_800),
     ("2-12:30", 217_800), ("2-0:0:5", 172_805), ("UNLIMITED", None)],
)  # fmt: skip
def test_the_times_of_slurm_are_taken(time, seconds):
    assert given(slurm_run(time=time))["time"] == time
    assert time_limit_s(Slurm(time=time)) == seconds


@pytest.mark.parametrize(
    ("key", "value"),
    [("partition", "gpu\n#SBATCH --uid=0"), ("account", "lab other"), ("qos", "high #"),
     ("constraint", "a100 & ib"), ("reservation", "a;b"), ("mail", "me@x.org,you@x.org"),
     ("mail", "me@x.org --uid=0"), ("gpu_type", "h100:8"), ("memory_per_node", "64 G"),
     ("network_interface", "eth0; rm"), ("container", "a b"), ("container", "/i\n.sif")],
)  # fmt: skip
def test_a_value_that_would_be_more_than_one_is_refused(key, value):
    with pytest.raises(ConfigError) as refused:
        slurm_run(**{key: value})
    assert refused.value.where == f"cluster.{key}"


@pytest.mark.parametrize(
    ("key", "value"),
    [("exclude", "node[7-8"), ("exclude", "node7 node8"), ("modules", "cuda; rm"),
     ("modules", "a\nb"), ("setup", "cd /\nrm x"), ("setup", " "), ("mail_events", "SOMETIMES"),
     ("extra", "--nice=1\n#SBATCH --uid=0"), ("extra", "nice"), ("extra", "--array=0-3"),
     ("extra", "--wait"), ("extra", "--output=/x"),
     ("setup", "export WANDB_API_KEY=0123456789abcdef"), ("setup", "HF_TOKEN='hf_x' true")],
)  # fmt: skip
def test_an_entry_that_is_none_is_refused_by_its_number(key, value):
    fine = {"exclude": "node-x[1,3-8].y", "modules": "gcc/13.2"}
    fine |= {"setup": "export WANDB_API_KEY=$(cat ~/.key)", "mail_events": "END", "extra": "--x=1"}
    with pytest.raises(ConfigError) as refused:
        slurm_run(**{key: [fine[key], value]})
    assert refused.value.where == f"cluster.{key}[1]"


def test_what_excludes_each_other_is_refused():
    for fields, key in (
        ({"exclude_bad_nodes": True, "preflight": False}, "cluster.exclude_bad_nodes"),
        ({"exclude_bad_nodes": True, "requeue": False}, "cluster.exclude_bad_nodes"),
        ({"container_mounts": ["/data"]}, "cluster.container_mounts"),
    ):
        with pytest.raises(ConfigError) as refused:
            slurm_run(**fields)
        assert refused.value.where == key


@pytest.mark.parametrize("folder", ["/runs/a\n#SBATCH --uid=0", "/runs/a\\b"])
def test_a_folder_that_would_break_the_script_is_refused(folder):
    with pytest.raises(ConfigError) as refused:
        render(slurm_run(), Path(folder))
    assert refused.value.where == "output_root"


# ------------------------------------------------------------------------- before the time limit


def planned(folder: Path, checkpoint_s: float, step_s: float) -> None:
    speed = {"checkpoint_s": checkpoint_s, "step_s": step_s}
    (folder / "plan.json").write_text(json.dumps({"plan": {"speed": speed}}))


def test_the_lead_follows_from_the_planned_save_and_step(tmp_path):
    run = slurm_run(time="08:00:00")
    assert signal_lead(run, tmp_path) == (120, "nothing is measured yet")
    planned(tmp_path, checkpoint_s=400, step_s=12.5)
    assert signal_lead(run, tmp_path) == (1.5 * 400 + 2 * 12.5 + 30, "planned")
    assert "--signal=B:USR1@655" in header(render(run, tmp_path))
    assert "\n# 655 s before the time limit (planned) the run saves" in render(run, tmp_path)
    planned(tmp_path, checkpoint_s=0.2, step_s=0.1)  # a guess is no reason for less
    assert signal_lead(run, tmp_path) == (120, "planned")


def test_half_of_the_time_is_left_to_train(tmp_path):
    planned(tmp_path, checkpoint_s=4000, step_s=1)
    assert signal_lead(slurm_run(time="01:00:00"), tmp_path)[0] == 1800
    assert signal_lead(slurm_run(time="UNLIMITED"), tmp_path)[0] == 6032
    planned(tmp_path, checkpoint_s=100_000, step_s=1)  # above what sbatch takes
    assert given(slurm_run(time="10-00"), str(tmp_path))["signal"] == "B:USR1@65535"


def test_the_users_own_signal_counts():
    text = render(slurm_run(extra=["--signal=B:USR1@600"]), Path("/runs/a"))
    signals = [line for line in header(text) if line.startswith("--signal")]
    assert signals == ["--signal=B:USR1@120", "--signal=B:USR1@600"]  # Slurm takes the last one
    assert "\n# At the signal of cluster.extra (--signal=B:USR1@600) the run saves" in text
    assert "120 s before" not in text


# ------------------------------------------------------------------------------------ containers


def test_an_image_shows_what_the_run_reads_and_writes():
    # Not below /tmp, which is shown anyway.
    home = Path(tempfile.mkdtemp(dir="/var/tmp"))
    blobs, model, data = (home / name for name in ("blobs", "model", "data"))
    for folder in (blobs, model, data):
        folder.mkdir()
    (blobs / "0abc").touch()
    (model / "model.safetensors").symlink_to("../blobs/0abc")  # as in the hub's cache
    (data / "rows.jsonl").touch()
    run = slurm_run(container="/i.sif", container_mounts=["/scratch:/s:ro", "/more"])
    run.model = ModelConfig(path=str(model))
    run.data.train = str(data / "*.jsonl")
    run.output_root = str(home / "runs")
    try:
        found = mounts(run, home / "runs" / "mine" / "1")
        shown = [f"{home}/{name}" for name in ("blobs", "data", "model", "runs")]
        assert found == ["/tmp", *shown, "/scratch:/s:ro", "/more"]
        run.cluster.container_mounts = [str(home)]
        assert mounts(run, home / "runs" / "mine" / "1") == ["/tmp", str(home)]
    finally:
        shutil.rmtree(home)


def test_a_name_that_no_mount_can_have_is_refused():
    run = slurm_run(container="/i.sif")
    with pytest.raises(ConfigError) as refused:
        mounts(run, Path("/runs/a,b"))
    assert refused.value.where == "cluster.container"


def test_gpus_reach_into_the_image_and_the_programs_are_its_own():
    of = ContainerRuntime.apptainer
    text = render(slurm_run(container="/i.sif", container_runtime=of, gpus_per_node=1), Path("/r"))
    cpus = render(slurm_run(container="/i.sif", container_runtime=of, gpus_per_node=0), Path("/r"))
    assert "wrap=(apptainer exec --nv --bind=/r --bind=/tmp --pwd=/r /i.sif)" in text
    assert "wrap=(apptainer exec --bind=/r --bind=/tmp --pwd=/r /i.sif)" in cpus
    assert "export POSTTRAIN_BIN=''" in text
    assert "wrap=()" in render(slurm_run(container="/i.sqsh", gpus_per_node=1), Path("/r"))


def test_paths_reach_the_shell_as_they_are(tmp_path):
    folder = tmp_path / 'it\'s $HOME "and" `more`'
    text = render(slurm_run(network_interface="ib0", setup=['echo "$HOME"  two']), folder)
    variables = text[: text.index("# What this site")]
    ask = variables + '\nprintf "%s\\n" "$POSTTRAIN_RUN" "$POSTTRAIN_INTERFACE" "${site_setup[@]}"'
    ask += '; ls "$POSTTRAIN_BIN"'
    said = subprocess.run(["bash", "-c", ask], capture_output=True, text=True, check=True).stdout
    run_folder, interface, setup, *programs = said.splitlines()
    assert run_folder == str(folder)
    assert (interface, setup) == ("ib0", 'echo "$HOME"  two')
    assert {"posttrain", "ray"} <= set(programs)


def test_a_job_asks_for_no_more_than_the_hardware_has():
    with pytest.raises(ConfigError) as refused:
        complete(
            RunConfig(
                cluster=Slurm(gpus_per_node=8), hardware=Hardware(gpu="h100", gpus_per_node=4)
            )
        )
    assert refused.value.where == "cluster.gpus_per_node"
