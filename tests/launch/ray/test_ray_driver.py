"""Ray runs: the same numbers as without Ray, a lost worker, bad input, and nothing left behind."""

import contextlib
import json
import os
import signal
import subprocess
import sysconfig
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from posttrain_launch.ray import child as ray_driver
from posttrain_launch.ray.gate import OPEN

from posttrain_dist import errors
from posttrain_dist.checkpoint.store import whole_checkpoints
from posttrain_dist.config import (
    DataConfig,
    ModelConfig,
    Ray,
    RunConfig,
    Slurm,
    TrainConfig,
    complete,
)
from posttrain_dist.engine import AdamW, DeepSpeed, Single
from posttrain_dist.errors import ClusterError, ConfigError, DataError, ModelError, SeveralErrors
from posttrain_dist.files import read_rows
from posttrain_dist.metrics import LoggingConfig, WandbMode
from posttrain_dist.prepare import prepare

POSTTRAIN = Path(sysconfig.get_path("scripts")) / "posttrain"


@pytest.fixture(scope="module")
def base(tiny_llama, rows_file):
    return complete(
        RunConfig(
            model=ModelConfig(path=str(tiny_llama)),
            data=DataConfig(train=str(rows_file), max_length=64),
            optimizer=AdamW(lr=3e-3),
            engine=DeepSpeed(stage=1),
            cluster=Ray(workers=2),
            train=TrainConfig(steps=8, batch_size=4, micro_batch_size=2, save_every=2),
            logging=LoggingConfig(wandb=WandbMode.off),
        )
    )


def freeze(folder: Path, config: RunConfig) -> Path:
    folder.mkdir(parents=True)
    prepare(config, folder / "prepared")
    (folder / "config.yaml").write_text(config.to_yaml())
    return folder


def losses(folder: Path) -> list[float]:
    rows = read_rows(folder / "metrics.jsonl")
    return [row["train/loss"] for row in rows if "train/loss" in row]


def processes_of(folder: Path) -> list[int]:
    """Everything that was started for the run: its folder is in the command line or the cwd."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            command = (entry / "cmdline").read_bytes()
            cwd = str((entry / "cwd").readlink())
            if str(folder).encode() in command or cwd.startswith(str(folder)):
                found.append(int(entry.name))
    return found


def wait_until(condition, timeout_s: float):
    end = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)
    return value


# ------------------------------------------------------------------------------- no Ray needed


def test_workers_follow_what_is_there():
    from posttrain_launch.ray.job import place

    two_cpus, gpu_node = {"CPU": 2.0}, {"CPU": 32.0, "GPU": 4.0}
    assert place(Ray(), [two_cpus]) == (1, False)
    assert place(Ray(workers=2), [two_cpus]) == (2, False)
    assert place(Ray(workers=4, cpus_per_worker=0.5), [two_cpus]) == (4, False)
    assert place(Ray(cpus_per_worker=8), [gpu_node]) == (4, True)
    assert place(Ray(cpus_per_worker=8), [gpu_node, gpu_node]) == (8, True)
    assert place(Slurm(nodes=3), [two_cpus] * 3) == (3, False)


@pytest.mark.parametrize(
    ("cluster", "nodes", "is_there", "fix"),
    [
        (Ray(workers=5), [{"CPU": 2.0}], "2 CPUs and no GPU", "cluster.workers to at most 2"),
        (Ray(workers=5), [{"CPU": 2.0}], "2 CPUs", "cluster.cpus_per_worker to at most 0.4"),
        # Three CPUs in all, but a worker lives on one node.
        (Ray(cpus_per_worker=2, workers=2), [{"CPU": 2.0}, {"CPU": 1.0}], "2 nodes", "at most 1"),
        (Ray(workers=3), [{"CPU": 9.0, "GPU": 2.0}], "2 GPUs", "cluster.workers to at most 2"),
    ],
)
def test_more_workers_than_resources_is_told(cluster, nodes, is_there, fix):
    from posttrain_launch.ray.job import place

    with pytest.raises(ClusterError) as failure:
        place(cluster, nodes)
    assert failure.value.where == "cluster.workers"
    assert is_there in failure.value.what
    assert fix in failure.value.fix


@pytest.mark.parametrize(
    "error",
    [
        DataError("no assistant turn", where="rows.jsonl:3", fix="add one"),
        SeveralErrors([ConfigError("is 0", where="train.steps"), ModelError("no weights")]),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_error_survives_its_file(error, tmp_path):
    file = tmp_path / "error.json"
    file.write_text(json.dumps(ray_driver.error_fields(error, 1, "a trace")))
    back = ray_driver.read_error(file, tmp_path / "driver.log")
    assert type(back) is type(error)
    assert str(back) == str(error)
    assert json.loads(file.read_text())["rank"] == 1


def test_a_slurm_run_outside_of_a_job_is_refused(tmp_path, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    config = complete(RunConfig(cluster=Slurm()))
    with pytest.raises(ClusterError, match="posttrain submit"):
        ray_driver.run(config, tmp_path, None)


@pytest.mark.parametrize(
    ("address", "what"),
    [
        ("127.0.0.1:9", "no Ray answers there after 0.2 s"),
        ("127.0.0.1:many", "is no address of a Ray"),
        ("ray://127.0.0.1:10001", "client address"),
    ],
)
def test_an_address_without_a_ray_is_named(address, what):
    from posttrain_launch.ray.job import join

    with pytest.raises(ClusterError) as failure:
        join(address, timeout_s=0.2)
    assert failure.value.where == f"cluster.address={address}"
    assert what in failure.value.what


# --------------------------------------------------------------------------------- a real Ray


@pytest.mark.ray
def test_a_killed_worker_is_replaced_and_the_numbers_are_those_without_ray(
    base, tmp_path, run_workers
):
    plain = freeze(tmp_path / "plain", base)
    run_workers("train_runs.py", 2, plain)
    folder = freeze(tmp_path / "ray", base)
    killed = []

    def kill_one_worker():
        def saved():
            return list((folder / "checkpoints").glob("step-*/MANIFEST.json"))

        wait_until(saved, 300)
        workers = [pid for pid in processes_of(folder) if is_worker(pid)]
        os.kill(max(workers), signal.SIGKILL)
        killed.extend(workers)

    killer = threading.Thread(target=kill_one_worker)
    killer.start()
    ray_driver.run(base, folder)
    killer.join()
    assert len(killed) == 2
    assert worker_groups_started(folder) == 2
    assert actors_of(folder) == {"TrainController", "RayTrainWorker", "SynchronizationActor"}
    assert json.loads((folder / "logs" / "outcome.json").read_text())["outcome"] == "completed"
    assert losses(folder) == pytest.approx(losses(plain), rel=1e-6)
    assert len(losses(folder)) == 8
    assert processes_of(folder) == []


def worker_groups_started(folder: Path) -> int:
    """As Ray Train's controller logged it."""
    [log] = (folder / "ray" / "logs" / "train").glob("ray-train-sys-controller-*.log")
    return log.read_text().count("Started training worker group of size 2")


def actors_of(folder: Path) -> set[str]:
    """Kinds of the actors that the run's own Ray had, each a process of its own."""
    logs = (folder / "ray" / "logs").glob("worker-*.err")
    lines = [line for log in logs for line in log.read_text().splitlines()]
    return {line.removeprefix(":actor_name:") for line in lines if line.startswith(":actor_name:")}


def is_worker(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return b"RayTrainWorker" in Path(f"/proc/{pid}/cmdline").read_bytes()
    return False


@pytest.mark.ray
def test_a_users_error_in_a_worker_comes_back_whole_and_is_not_retried(base, tmp_path, builders):
    model = builders.model(tmp_path / "model")
    config = replace(base, model=ModelConfig(path=str(model)))
    folder = freeze(tmp_path / "run", config)
    weights = model / "model.safetensors"
    os.truncate(weights, weights.stat().st_size // 2)
    with pytest.raises(ModelError) as failure:
        ray_driver.run(config, folder)
    assert str(model) in failure.value.where
    assert failure.value.fix
    assert worker_groups_started(folder) == 1
    told = json.loads((folder / "logs" / "error.json").read_text())
    assert told["kind"] == errors.ModelError.__name__
    assert told["what"] == failure.value.what
    assert processes_of(folder) == []


@pytest.mark.ray
def test_data_that_cannot_be_used_ends_the_ray_that_was_started_beside(base, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"messages": [{"role": "user", "content": "no answer"}]}\n' * 3)
    config = replace(base, data=DataConfig(train=str(rows)))
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text(config.to_yaml())
    done = subprocess.run([POSTTRAIN, "run", folder], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert f"{rows}:1" in done.stderr
    assert not (folder / "metrics.jsonl").exists()
    assert processes_of(folder) == []


@pytest.mark.ray
def test_one_ctrl_c_saves_and_run_goes_on_to_the_end(base, tmp_path):
    train = replace(base.train, steps=5000, save_every=None)
    # One plain worker: that two agree on a stop is another test's, and this one starts Ray twice.
    config = replace(base, train=train, engine=Single(), cluster=Ray(workers=1))
    folder = freeze(tmp_path / "run", config)
    driver = subprocess.Popen([POSTTRAIN, "run", folder], stdout=subprocess.PIPE, text=True)
    try:
        rows = folder / "metrics.jsonl"
        wait_until(lambda: rows.is_file() and len(losses(folder)) > 2, 120)
        driver.send_signal(signal.SIGINT)
        said, _ = driver.communicate(timeout=60)
    finally:
        driver.kill()
    assert driver.returncode == 130
    stopped = json.loads((folder / "logs" / "outcome.json").read_text())
    step = stopped["step"]
    assert stopped["outcome"] == "stopped" and 2 < step < 5000
    assert f"saved and left at step {step} of 5000; go on with: posttrain run {folder}" in said
    assert [path.name for path in whole_checkpoints(folder)] == [f"step-{step:06d}"]
    assert processes_of(folder) == []

    before = losses(folder)
    assert len(before) == step
    end = step + 2  # shortened by hand, so that it ends soon
    frozen = folder / "config.yaml"
    frozen.write_text(frozen.read_text().replace("steps: 5000", f"steps: {end}"))
    done = subprocess.run([POSTTRAIN, "run", folder], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert json.loads((folder / "FINISHED").read_text()) == {"reason": "completed", "step": end}
    assert losses(folder)[:step] == before and len(losses(folder)) == end


@pytest.mark.ray
@pytest.mark.parametrize("ending", ["two Ctrl-C", "a killed driver"])
def test_nothing_is_left_running(ending, base, tmp_path):
    one = replace(base, engine=Single(), cluster=Ray(workers=1))
    folder = freeze(tmp_path / "run", base if ending == "a killed driver" else one)
    driver = subprocess.Popen([POSTTRAIN, "run", folder], stdout=subprocess.PIPE, text=True)

    def ray_runs():
        return [pid for pid in processes_of(folder) if pid != driver.pid] and any(
            b"raylet" in Path(f"/proc/{pid}/cmdline").read_bytes()
            for pid in ray_driver.session_members(job_of(driver.pid))
        )

    wait_until(lambda: job_of(driver.pid), 60)
    job = job_of(driver.pid)
    wait_until(ray_runs, 60)
    if ending == "two Ctrl-C":  # the first is a stop request from the moment that the data is there
        gate = folder / "logs" / "data.gate"
        wait_until(lambda: gate.read_text() == OPEN, 60)
        driver.send_signal(signal.SIGINT)
        wait_until((folder / "STOP").exists, 10)
        driver.send_signal(signal.SIGINT)
        assert driver.wait(timeout=30) == 130
        assert ray_driver.session_members(job) == []  # at once: the driver sees to it itself
    else:
        driver.kill()
        driver.wait()
        wait_until(lambda: not ray_driver.session_members(job), 30)
    wait_until(lambda: not processes_of(folder), 30)
    assert not (folder / "FINISHED").exists()


def job_of(driver: int) -> int:
    """The Ray job's pid: the driver's child that leads a session of its own."""
    for child in Path(f"/proc/{driver}/task/{driver}/children").read_text().split():
        with contextlib.suppress(OSError):
            if os.getsid(int(child)) == int(child):
                return int(child)
    return 0
