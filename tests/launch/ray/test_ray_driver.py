"""Ray runs: bad input, signals, and nothing left behind. See also tests/test_demo.py."""

import contextlib
import json
import os
import signal
import subprocess
import sysconfig
from dataclasses import replace
from pathlib import Path

import pytest
from posttrain_launch.cli import main
from posttrain_launch.ray import child as ray_driver
from posttrain_launch.ray import temp_folder
from ray_runs import losses, processes_of, wait_until, worker_groups_started

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
from posttrain_dist.errors import (
    ClusterError,
    ConfigError,
    DataError,
    ModelError,
    SeveralErrors,
    error_fields,
)
from posttrain_dist.files import temporary
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


def one_worker(config: RunConfig) -> RunConfig:
    """That two agree is shown by the demo's test; a worker less saves 8 s of imports."""
    return replace(config, engine=Single(), cluster=Ray(workers=1))


def freeze(folder: Path, config: RunConfig) -> Path:
    folder.mkdir(parents=True)
    prepare(config, folder / "prepared")
    (folder / "config.yaml").write_text(config.to_yaml())
    return folder


# ------------------------------------------------------------------------------- no Ray needed


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
    file.write_text(json.dumps(error_fields(error, 1, "a trace")))
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


def test_an_address_that_nobody_typed_is_told_by_its_variable(base, tmp_path, monkeypatch):
    from posttrain_launch.ray import job

    seen = []
    monkeypatch.setattr(ray_driver.subprocess, "Popen", lambda command, **_: seen.append(command))
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
    asked = replace(base, cluster=Ray(address="127.0.0.1:8"))
    for config, named in ((base, None), (asked, None), (asked, "127.0.0.1:7")):
        with contextlib.suppress(AttributeError), ray_driver.started(config, tmp_path, named):
            pass
    options = [dict(w[2:].split("=", 1) for w in each if w.startswith("--")) for each in seen]
    sources = [(each["address"], each["given-by"]) for each in options]
    assert sources == [
        ("127.0.0.1:9", "the environment variable RAY_ADDRESS"),
        ("127.0.0.1:8", "cluster.address"),
        ("127.0.0.1:7", "--address"),
    ]
    with pytest.raises(ClusterError) as failure:
        job.join("127.0.0.1:9", 0.2, sources[0][1])
    assert failure.value.where == "the environment variable RAY_ADDRESS=127.0.0.1:9"
    assert "unset RAY_ADDRESS" in failure.value.fix


# ------------------------------------------------------------------------ the folder of our Ray


def test_the_folder_is_private_and_of_a_dead_run_only_the_logs_are_kept(tmp_path, monkeypatch):
    """Whose folders are removed is tested in tests/test_temporary.py."""
    monkeypatch.setattr(temp_folder.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(temp_folder, "LONGEST", 999)
    run = tmp_path / "run"
    run.mkdir()
    folder = temp_folder.make(run)
    assert folder.stat().st_mode & 0o777 == 0o700
    logs = temp_folder.ray_folder(folder) / "session_latest" / "logs"
    logs.mkdir(parents=True)
    logs.chmod(0o777)
    (logs / "gcs_server.out").write_text("its last words")
    assert temp_folder.make(run) != folder and folder.exists()  # that of a living run stays

    marker = folder / temporary.MARKER
    marker.write_text(json.dumps(json.loads(marker.read_text()) | {"start": "1"}))
    temp_folder.make(tmp_path / "another")
    assert not folder.exists()
    assert (run / "ray" / "logs" / "gcs_server.out").read_text() == "its last words"
    assert (run / "ray" / "logs").stat().st_mode & 0o777 == 0o700


# --------------------------------------------------------------------------------- a real Ray


@pytest.mark.ray
def test_a_users_error_in_a_worker_comes_back_whole_and_is_not_retried(base, tmp_path, builders):
    model = builders.model(tmp_path / "model")
    config = replace(one_worker(base), model=ModelConfig(path=str(model)))
    folder = freeze(tmp_path / "run", config)
    weights = model / "model.safetensors"
    os.truncate(weights, weights.stat().st_size // 2)
    with pytest.raises(ModelError) as failure:
        ray_driver.run(config, folder)
    assert str(model) in failure.value.where
    assert failure.value.fix
    assert worker_groups_started(folder, size=1) == 1
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
def test_one_ctrl_c_saves_and_two_leave_at_once(base, tmp_path):
    one = one_worker(base)
    config = replace(one, train=replace(one.train, steps=5000, save_every=None))
    folder = freeze(tmp_path / "run", config)

    def drive_until(num_steps: int) -> subprocess.Popen[str]:
        driver = subprocess.Popen([POSTTRAIN, "run", folder], stdout=subprocess.PIPE, text=True)
        rows = folder / "metrics.jsonl"
        try:
            wait_until(lambda: rows.is_file() and len(losses(folder)) > num_steps, 120)
        except BaseException:
            driver.kill()
            raise
        return driver

    driver = drive_until(2)
    try:
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

    frozen = folder / "config.yaml"
    frozen.write_text(frozen.read_text().replace("lr: 0.003", "lr: 0.002"))
    driver = drive_until(step + 1)  # it goes on where it was
    try:
        job = job_of(driver.pid)
        driver.send_signal(signal.SIGINT)
        wait_until((folder / "STOP").exists, 10)
        driver.send_signal(signal.SIGINT)
        said, _ = driver.communicate(timeout=30)
        assert driver.returncode == 130
        assert ray_driver.session_members(job) == []  # at once: the driver sees to it itself
    finally:
        driver.kill()
    assert losses(folder)[:step] == before
    told = f"going on from step {step} with other settings: optimizer.lr was 0.003, now 0.002"
    assert said.count(told) == 1
    wait_until(lambda: not processes_of(folder), 30)
    assert not (folder / "FINISHED").exists()


@pytest.mark.ray
def test_a_killed_driver_leaves_nothing_running(base, tmp_path):
    folder = freeze(tmp_path / "run", base)
    driver = subprocess.Popen([POSTTRAIN, "run", folder], stdout=subprocess.PIPE, text=True)

    def ray_runs():
        return [pid for pid in processes_of(folder) if pid != driver.pid] and any(
            b"raylet" in Path(f"/proc/{pid}/cmdline").read_bytes()
            for pid in ray_driver.session_members(job_of(driver.pid))
        )

    wait_until(lambda: job_of(driver.pid), 60)
    job = job_of(driver.pid)
    wait_until(ray_runs, 60)
    driver.kill()
    driver.wait()
    wait_until(lambda: not ray_driver.session_members(job), 30)
    wait_until(lambda: not processes_of(folder), 30)
    assert not (folder / "FINISHED").exists()


@pytest.mark.ray
@pytest.mark.slow  # by default `place` is tested alone, and an error's way back by other faults
def test_more_workers_than_there_is_room_for(base, tmp_path):
    config = replace(base, cluster=Ray(workers=999))
    folder = freeze(tmp_path / "run", config)
    done = subprocess.run([POSTTRAIN, "run", folder], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "error: cluster.workers: is 999, each with 1 CPUs" in done.stderr
    assert f"there are {os.cpu_count()} CPUs" in done.stderr
    assert "set cluster.workers to at most" in done.stderr
    assert "Traceback" not in done.stderr


def job_of(driver: int) -> int:
    """The Ray job's pid: the driver's child that leads a session of its own."""
    for child in Path(f"/proc/{driver}/task/{driver}/children").read_text().split():
        with contextlib.suppress(OSError):
            if os.getsid(int(child)) == int(child):
                return int(child)
    return 0


@pytest.mark.slow
@pytest.mark.ray
def test_a_cluster_that_is_not_there_is_named_before_data_are_prepared(
    tiny_llama, rows_file, tmp_path, capsys
):
    words = [f"model.path={tiny_llama}", f"data.train={rows_file}", f"output_root={tmp_path}/out"]
    assert main(["train", *words, "cluster=ray", "cluster.address=127.0.0.1:9"]) == 1
    printed = capsys.readouterr()
    assert "no Ray answers there" in printed.err and "nothing was begun" in printed.err
    assert "data report" not in printed.out
