"""A Ray of several nodes with a token: joined, taken apart, and what its runs say of it."""

import contextlib
import json
import socket
import subprocess
import sys
import sysconfig
import threading
import time
from pathlib import Path

import pytest
from posttrain_launch.lifecycle.exit_codes import Exit
from posttrain_launch.ray import head_watch
from posttrain_launch.ray.child import session_members
from posttrain_launch.ray.head_watch import HeadWatch, address_file, leave_training
from ray_cluster import RayCluster, ray_cluster
from ray_runs import is_worker, losses, processes_of, small_run, wait_until

from posttrain_dist.errors import ClusterLost

POSTTRAIN = Path(sysconfig.get_path("scripts")) / "posttrain"


def words(cluster: RayCluster, model: Path, rows: Path, root: Path, steps: int) -> list[str]:
    run = small_run(model, rows, root, steps)
    return [str(POSTTRAIN), "train", *run, f"cluster.address={cluster.address}"]


def drive(cluster: RayCluster, command: list[str], said: Path, **changes: str | None):
    with said.open("w") as out:
        return subprocess.Popen(
            command, stdout=out, stderr=out, cwd=said.parent, env=cluster.environment(**changes)
        )


def folder_of(root: Path) -> Path:
    [folder] = wait_until(lambda: list((root / "small").glob("*/config.yaml")), 60)
    return folder.parent


def steps_of(folder: Path) -> int:
    return len(losses(folder)) if (folder / "metrics.jsonl").is_file() else 0


# ------------------------------------------------------------------------------- no Ray needed


def test_a_head_is_lost_when_its_port_does_not_answer_for_a_while(tmp_path, monkeypatch):
    monkeypatch.setattr(head_watch, "POLL_S", 0.0)
    (tmp_path / "logs").mkdir()
    watch = HeadWatch(tmp_path, lost_after_s=0.2)
    time.sleep(0.3)
    assert not watch.is_lost()  # no head is known yet
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        address_file(tmp_path).write_text(f"{address}\n")
        time.sleep(0.3)
        assert not watch.is_lost()
    assert not watch.is_lost()  # a short silence is none
    time.sleep(0.3)
    assert watch.is_lost()
    error = watch.error(tmp_path)
    assert isinstance(error, ClusterLost) and error.where == address
    assert f"posttrain run {tmp_path}" in error.fix


def test_workers_without_a_head_are_waited_for_until_they_have_saved(tmp_path, monkeypatch):
    (tmp_path / "logs").mkdir()
    outcome = tmp_path / "logs" / "outcome.json"

    def train() -> None:
        wait_until((tmp_path / "STOP").exists, 10)
        outcome.write_text("{}")

    worker = threading.Thread(target=train)
    worker.start()
    assert leave_training(tmp_path)
    worker.join()
    assert outcome.exists() and "head of Ray" in (tmp_path / "STOP").read_text()
    # That outcome is old now; nobody is waited for longer than a step and a save have taken.
    monkeypatch.setattr(head_watch, "lead_of", lambda _: (head_watch.TEARDOWN_S - 4.9, ""))
    monkeypatch.setattr(head_watch, "LEAVE_AT_MOST_S", 1e9)
    assert not leave_training(tmp_path)


# ------------------------------------------------------------------------------- a real cluster


def secrets_in_sight(secret: str) -> list[str]:
    """Processes that show it in their command line, which every user of the machine can read."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if secret.encode() in (entry / "cmdline").read_bytes():
                found.append(entry.name)
    return found


@pytest.mark.ray
@pytest.mark.slow
def test_a_labelled_node_trains_and_the_token_is_nowhere(tiny_llama, rows_file, tmp_path):
    with ray_cluster() as cluster:
        cluster.start_head("--num-cpus=1", "--labels=zone=west")
        command = words(cluster, tiny_llama, rows_file, tmp_path / "out", steps=3)
        done = subprocess.run(
            [*command, "cluster.labels.zone=east"],
            env=cluster.environment(),
            capture_output=True,
            text=True,
            timeout=100,
        )
        assert done.returncode == 1
        assert "cluster.labels.zone: is east, and of 1 nodes none has such labels" in done.stderr
        cluster.start_node("--num-cpus=1", "--labels=zone=east", '--resources={"disk": 1}')

        command += ["cluster.labels.zone=east", "cluster.resources_per_worker.disk=1"]
        command += ["cluster.environment.MARK_OF_TEST=seen", "cluster.memory_per_worker_gib=0.5"]
        driver = drive(cluster, command, tmp_path / "said")
        in_sight, where, marks = set(), set(), set()
        while driver.poll() is None:
            in_sight |= set(secrets_in_sight(cluster.token))
            for index, node in enumerate(cluster.nodes):
                for pid in filter(is_worker, session_members(node.pid)):
                    where.add(index)
                    with contextlib.suppress(OSError):
                        if b"MARK_OF_TEST=seen" in Path(f"/proc/{pid}/environ").read_bytes():
                            marks.add(index)
            time.sleep(0.05)
        assert driver.returncode == 0, (tmp_path / "said").read_text()
        assert (where, marks, in_sight) == ({1}, {1}, set())
        folder = folder_of(tmp_path / "out")
        assert steps_of(folder) == 3
        files = [*tmp_path.rglob("*"), *cluster.logs().rglob("*")]
        texts = [file for file in files if file.is_file() and not file.is_symlink()]
        assert [file for file in texts if cluster.token.encode() in file.read_bytes()] == []

        for changes, what in (
            ({"RAY_AUTH_TOKEN": "0" * 48}, "refuses the token"),
            ({"RAY_AUTH_MODE": None, "RAY_AUTH_TOKEN_PATH": None}, "asks for a token"),
            ({"RAY_AUTH_TOKEN_PATH": "/not/here"}, "/not/here cannot be read"),
        ):
            done = subprocess.run(
                command,
                env=cluster.environment(**changes),
                capture_output=True,
                text=True,
                timeout=100,
            )
            assert done.returncode == 1
            assert f"error: cluster.address={cluster.address}: " in done.stderr
            assert what in done.stderr and "RAY_AUTH_TOKEN" in done.stderr


HOLD = """
import ray
ray.init(address="auto", log_to_driver=False)
holder = ray.remote(num_cpus=1)(type("Holder", (), {"ready": lambda self: True})).remote()
ray.get(holder.ready.remote())
print("held", flush=True)
input()
"""


@pytest.mark.ray
@pytest.mark.slow
def test_places_that_others_hold_are_waited_for_and_then_a_requeue(tiny_llama, rows_file, tmp_path):
    with ray_cluster() as cluster:
        cluster.start_head("--num-cpus=1")
        holder = subprocess.Popen(
            [sys.executable, "-c", HOLD],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=tmp_path,
            env=cluster.environment(RAY_ADDRESS=cluster.address),
        )
        try:
            assert holder.stdout.readline() == "held\n"
            command = words(cluster, tiny_llama, rows_file, tmp_path / "out", steps=3)
            waits = {"RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "2"}
            driver = drive(cluster, command, tmp_path / "said", **waits)
            code = driver.wait(timeout=100)
        finally:
            holder.kill()
        said = (tmp_path / "said").read_text()
        assert code == Exit.requeue, said
        assert "error: the Ray cluster: has had no free place for the workers" in said
        log = (folder_of(tmp_path / "out") / "logs" / "driver.log").read_text()
        assert "waiting for others to end: free are 0 of 1 CPU" in log


@pytest.mark.ray
@pytest.mark.slow
def test_a_lost_head_is_a_requeue_and_the_workers_save_first(tiny_llama, rows_file, tmp_path):
    with ray_cluster() as cluster:
        cluster.start_head("--num-cpus=0")
        cluster.start_node("--num-cpus=1")
        command = words(cluster, tiny_llama, rows_file, tmp_path / "out", steps=50_000)
        driver = drive(cluster, command, tmp_path / "said")
        try:
            folder = folder_of(tmp_path / "out")
            wait_until(lambda: steps_of(folder) > 3, 100)
            cluster.kill_control()
            began = time.monotonic()
            code = driver.wait(timeout=60)
            print(f"a lost head: exit after {time.monotonic() - began:.1f} s")
        finally:
            driver.kill()
        said = (tmp_path / "said").read_text()
        assert code == Exit.requeue, said
        lines = [line for line in said.splitlines() if line.startswith("error:")]
        assert len(lines) == 1 and "the head of Ray does not answer any more" in lines[0]
        outcome = json.loads((folder / "logs" / "outcome.json").read_text())
        saved = folder / "checkpoints" / f"step-{outcome['step']:06d}"
        assert outcome["outcome"] == "stopped" and (saved / "MANIFEST.json").is_file()
        assert outcome["step"] == steps_of(folder)  # not one step is lost


@pytest.mark.ray
@pytest.mark.slow
def test_a_lost_node_is_replaced_by_another_and_the_last_one_is_a_requeue(
    tiny_llama, rows_file, tmp_path
):
    def trains_on() -> int | None:
        for index, node in enumerate(cluster.nodes):
            if node.poll() is None and any(map(is_worker, session_members(node.pid))):
                return index
        return None

    with ray_cluster() as cluster:
        cluster.start_head("--num-cpus=0")
        cluster.start_node("--num-cpus=1")
        cluster.start_node("--num-cpus=1")
        command = words(cluster, tiny_llama, rows_file, tmp_path / "out", steps=50_000)
        driver = drive(cluster, [*command, "train.save_every=10"], tmp_path / "said")
        try:
            folder = folder_of(tmp_path / "out")
            wait_until(lambda: steps_of(folder) > 25, 100)
            first = trains_on()
            before = steps_of(folder)
            began = time.monotonic()
            cluster.kill_node(first)
            wait_until(lambda: steps_of(folder) > before + 30, 100)
            print(f"a lost node: trains again after {time.monotonic() - began:.1f} s")
            second = trains_on()
            assert {first, second} == {1, 2}
            began = time.monotonic()
            cluster.kill_node(second)
            code = driver.wait(timeout=100)
            print(f"the last node: exit after {time.monotonic() - began:.1f} s")
        finally:
            driver.kill()
        said = (tmp_path / "said").read_text()
        assert code == Exit.requeue, said
        assert "error: the Ray cluster: lost the node" in said
    wait_until(lambda: not processes_of(folder), 30)
