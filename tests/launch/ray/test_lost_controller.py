"""Ray Train's own processes are lost: the machines failed, and the run is to be started again."""

import contextlib
import json
import os
import signal
import subprocess
import sysconfig
from pathlib import Path

import pytest
from posttrain_launch.lifecycle.exit_codes import Exit
from ray_runs import losses, processes_of, wait_until

from posttrain_dist.config import RunConfig
from posttrain_dist.errors import ClusterError, ClusterLost

POSTTRAIN = Path(sysconfig.get_path("scripts")) / "posttrain"


def test_a_lost_controller_is_no_controller_that_cannot_begin(tmp_path):
    from posttrain_launch.ray.trainer import explain
    from ray.exceptions import ActorDiedError, RayActorError, RayTaskError
    from ray.train import ControllerError

    never_began = ActorDiedError(RayTaskError("__init__", "a trace", ValueError("a bad option")))
    for failure, kind in (
        (ActorDiedError(), ClusterLost),
        (ControllerError(RayActorError()), ClusterLost),
        (never_began, ClusterError),
        (ControllerError(ValueError("a bad option")), ClusterError),
    ):
        error = explain(failure, RunConfig(), tmp_path).error
        assert type(error) is kind, failure
        assert error.where == f"{tmp_path}/logs/driver.log"
        assert (f"posttrain run {tmp_path}" in error.fix) == (kind is ClusterLost)


def controllers(folder: Path) -> list[int]:
    """Ray Train's controllers of the run's own Ray, which keeps its logs in the run folder."""
    found = []
    sessions = {os.getsid(pid) for pid in processes_of(folder)}
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            is_one = b"TrainController" in (entry / "cmdline").read_bytes()
            if is_one and os.getsid(int(entry.name)) in sessions:
                found.append(int(entry.name))
    return found


@pytest.mark.ray
@pytest.mark.slow
def test_a_run_whose_controller_is_killed_goes_on_when_started_again(
    tiny_llama, rows_file, tmp_path
):
    words = [f"model.path={tiny_llama}", f"data.train={rows_file}", f"output_root={tmp_path}/out"]
    words += ["data.max_length=64", "train.batch_size=2", "train.steps=3000", "train.save_every=20"]
    words += ["engine=single", "cluster=ray", "cluster.workers=1", "logging.wandb=off"]
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    said = tmp_path / "said"
    with said.open("w") as out:
        driver = subprocess.Popen(
            [POSTTRAIN, "train", *words], stdout=out, stderr=out, env=environment
        )
    try:
        [config] = wait_until(lambda: list((tmp_path / "out").glob("run/2*/config.yaml")), 60)
        folder = config.parent
        wait_until(lambda: (folder / "metrics.jsonl").is_file() and len(losses(folder)) > 25, 120)
        [controller] = controllers(folder)
        os.kill(controller, signal.SIGKILL)
        assert driver.wait(90) == Exit.requeue, said.read_text()
    finally:
        driver.kill()
    [line] = [line for line in said.read_text().splitlines() if line.startswith("error:")]
    assert "a process of Ray that drives the workers was lost" in line
    [start] = map(json.loads, (folder / "logs" / "starts.jsonl").read_text().splitlines()[-1:])
    assert (start["code"], start["cause"]) == (Exit.requeue, "ray_lost")
    wait_until(lambda: not processes_of(folder), 30)
    assert list((folder / "checkpoints").glob("step-*"))
