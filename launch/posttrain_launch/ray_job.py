"""The Ray job of one run, a process of its own: `python -m posttrain_launch.ray_job RUN_FOLDER`.

It starts or joins Ray, checks that the workers fit, lets Ray Train place and restart them, and
leaves `logs/error.json` if that failed. It ends, and its Ray with it, when its stdin closes.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import shutil
import signal
import socket
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any

import ray
from ray.train import FailureConfig, ScalingConfig, UserCallback
from ray.train import RunConfig as RayRunConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2.api.exceptions import ControllerError, TrainingFailedError, WorkerGroupError

from posttrain_dist.config import Ray, RunConfig, Slurm
from posttrain_dist.errors import ClusterError, PosttrainError
from posttrain_launch.ray_driver import error_fields, quiet_environment, session_members
from posttrain_launch.ray_worker import WorkerError, train_worker

OBJECT_STORE_BYTES = 200_000_000  # nothing large travels through it
JOIN_TIMEOUT_S = 120.0  # for Ray to listen and for all nodes of a Slurm job to come
CONTROLLER_RETRIES = 4  # of a minute each, for workers to find their places after a lost node


def main() -> None:
    """Run the job; exit code 0 or, with `logs/error.json` written, 1."""
    parser = argparse.ArgumentParser(description="The Ray job of one run.")
    parser.add_argument("run_folder", type=Path)
    parser.add_argument("--address", default=None, help="host:port of a running Ray")
    parser.add_argument("--temp-dir", type=Path, default=None, help="for the sockets of our own")
    arguments = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a Ray driver that gets TERM may dump 300 MB
    run_folder = arguments.run_folder.resolve()
    threading.Thread(target=_end_with_driver, args=(arguments.temp_dir,), daemon=True).start()
    try:
        run_job(run_folder, arguments.address, arguments.temp_dir)
    except Exception as failure:
        traceback.print_exc()
        fields = _describe(failure, run_folder)
        target = run_folder / "logs" / "error.json"
        target.with_suffix(".tmp").write_text(json.dumps(fields, indent=1), encoding="utf-8")
        target.with_suffix(".tmp").rename(target)
        sys.exit(1)
    finally:
        ray.shutdown()


def _end_with_driver(temp_dir: Path | None) -> None:
    """Wait for the end of stdin (the driver died), then end this job and its own Ray."""
    while os.read(0, 1024):
        pass
    print("the driver is gone; ending", file=sys.stderr, flush=True)
    for pid in session_members(os.getpid()):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)
    if temp_dir is not None:
        shutil.rmtree(temp_dir, ignore_errors=True)
    os._exit(1)


def run_job(run_folder: Path, address: str | None, temp_dir: Path | None) -> None:
    """Start or join Ray and train.

    Raises:
        ClusterError: Ray cannot be reached, or the workers do not fit.
        TrainingFailedError: what Ray Train makes of a failed worker.
    """
    config = RunConfig.from_yaml((run_folder / "config.yaml").read_text(encoding="utf-8"))
    cluster = config.cluster
    assert isinstance(cluster, Ray)
    # Ray puts the driver's working directory on the workers' sys.path: never the checkout's.
    os.chdir(run_folder)
    if address:
        _join(address)
    else:
        ray.init(
            include_dashboard=False,
            log_to_driver=False,
            object_store_memory=OBJECT_STORE_BYTES,
            _temp_dir=str(temp_dir) if temp_dir else None,
            _node_ip_address="127.0.0.1",
        )
    _stage("ray is there")
    nodes = _nodes(cluster)
    workers, use_gpu = place(cluster, nodes)
    loopback = not address and sys.platform == "linux"  # all workers are here
    per_worker = {"CPU": cluster.cpus_per_worker} | ({"GPU": 1} if use_gpu else {})
    trainer = TorchTrainer(
        train_worker,
        train_loop_config={"config": config.to_yaml(), "run_folder": str(run_folder)},
        scaling_config=ScalingConfig(
            num_workers=workers,
            use_gpu=use_gpu,
            resources_per_worker=per_worker,
            placement_strategy="PACK" if use_gpu or len(nodes) == 1 else "SPREAD",
        ),
        torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo"),
        run_config=RayRunConfig(
            storage_path=str(run_folder / "ray"),
            failure_config=FailureConfig(
                max_failures=cluster.max_failures, controller_failure_limit=CONTROLLER_RETRIES
            ),
            callbacks=[RefuseRetry()],
            worker_runtime_env={"env_vars": worker_environment(cluster, use_gpu, loopback)},
        ),
    )
    trainer.fit()
    _stage("the workers have ended")


def worker_environment(cluster: Ray, use_gpu: bool, loopback: bool) -> dict[str, str]:
    """Variables that a worker has from its first moment, before it imports torch."""
    environment = quiet_environment()
    environment["OMP_NUM_THREADS"] = str(max(1, int(cluster.cpus_per_worker)))
    if not use_gpu:
        environment["DS_ACCELERATOR"] = "cpu"
    if loopback:
        environment["GLOO_SOCKET_IFNAME"] = "lo"  # else the one that the host's name resolves to
    if isinstance(cluster, Slurm) and cluster.network_interface:
        environment["GLOO_SOCKET_IFNAME"] = cluster.network_interface
        environment["NCCL_SOCKET_IFNAME"] = cluster.network_interface
    return environment


class RefuseRetry(UserCallback):  # type: ignore[misc]
    """Ends the run at once when a worker meets an error that the user has to mend.

    What a callback raises is an error of the controller, and Ray Train retries only those of
    workers: training again on the same bad input would fail again.
    """

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Raise the first worker's fault that carries a user's error."""
        for _, failure in sorted(worker_exceptions.items()):
            if isinstance(failure, WorkerError) and failure.error is not None:
                raise failure


# ------------------------------------------------------------------------------- the cluster


def _join(address: str) -> None:
    """Connect to a running Ray, which may still be starting."""
    fix = "start Ray on this machine: `ray start --head`, or `ray start --address=HOST:PORT`"
    if "://" in address:
        raise ClusterError(
            "is a Ray client address, and the driver has to be on a node of the cluster",
            where=f"cluster.address={address}",
            fix="give HOST:PORT of the cluster's head node",
        )
    deadline = time.monotonic() + JOIN_TIMEOUT_S
    while True:
        try:
            if address != "auto":
                host, _, port = address.rpartition(":")
                socket.create_connection((host, int(port)), timeout=5).close()
            ray.init(address=address, log_to_driver=False)
            return
        except ValueError as refused:
            raise ClusterError(
                f"is no address of a Ray: {refused}", where=f"cluster.address={address}", fix=fix
            ) from refused
        except (OSError, RuntimeError) as refused:  # not listening yet, or no node of it here yet
            if time.monotonic() > deadline:
                raise ClusterError(
                    f"no Ray answers there after {JOIN_TIMEOUT_S:.0f} s: {refused}",
                    where=f"cluster.address={address}",
                    fix=fix,
                ) from refused
        time.sleep(0.5)


def _nodes(cluster: Ray) -> list[dict[str, float]]:
    """Resources of every node that is alive; in a Slurm job after all its nodes have come."""
    wanted = cluster.nodes if isinstance(cluster, Slurm) else 1
    deadline = time.monotonic() + JOIN_TIMEOUT_S
    while True:
        found = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        if len(found) >= wanted:
            return found
        if time.monotonic() > deadline:
            raise ClusterError(
                f"{len(found)} of {wanted} nodes joined Ray within {JOIN_TIMEOUT_S:.0f} s",
                where="cluster.nodes",
                fix="read logs/ray-*.log of the run folder for what the others say",
            )
        time.sleep(0.2)


def place(cluster: Ray, nodes: list[dict[str, float]]) -> tuple[int, bool]:
    """How many workers there are to be, and whether on GPUs.

    Args:
        cluster: what was asked for.
        nodes: resources of each node, as `{"CPU": 8.0, "GPU": 2.0}`.

    Raises:
        ClusterError: they do not fit on what is there.
    """
    gpus = int(sum(node.get("GPU", 0) for node in nodes))
    cpus = sum(node.get("CPU", 0) for node in nodes)
    per_worker = cluster.cpus_per_worker
    default = gpus or (len(nodes) if isinstance(cluster, Slurm) else 1)
    workers = cluster.workers or default

    def room(node: dict[str, float]) -> int:
        places = int(node.get("CPU", 0) / per_worker + 1e-9)
        return min(places, int(node.get("GPU", 0))) if gpus else places

    if workers > sum(map(room, nodes)):
        there = f"{cpus:g} CPUs" + (f" and {gpus} GPUs" if gpus else " and no GPU")
        there += f" on {len(nodes)} nodes" if len(nodes) > 1 else ""
        need = f"{per_worker:g} CPUs" + (" and a GPU" if gpus else "")
        fits = sum(map(room, nodes))
        fixes = [f"set cluster.workers to at most {fits}"] if fits else []
        if not gpus or workers <= gpus:
            share = int(100 * sum(node.get("CPU", 0) for node in nodes) / workers) / 100
            fixes.append(f"set cluster.cpus_per_worker to at most {share:g}")
        raise ClusterError(
            f"is {workers}, each with {need}, and there are {there}",
            where="cluster.workers",
            fix=", or ".join(fixes),
        )
    return workers, gpus > 0


def _stage(what: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {what}", file=sys.stderr, flush=True)


# ------------------------------------------------------------------------------- failures


def _describe(failure: Exception, run_folder: Path) -> dict[str, Any]:
    """The content of `logs/error.json`."""
    trace = "".join(traceback.format_exception(failure))
    if isinstance(failure, PosttrainError):
        return error_fields(failure, None, trace)
    if isinstance(failure, ControllerError):
        cause = failure.controller_failure
        if isinstance(cause, WorkerError) and cause.error is not None:
            return error_fields(cause.error, cause.rank, cause.trace)
        what = f"Ray Train failed: {_first_line(cause)}"
    elif isinstance(failure, WorkerGroupError):
        return _describe_worker(failure.worker_failures, run_folder)
    elif isinstance(failure, TrainingFailedError):
        what = f"Ray Train failed: {_first_line(failure)}"
    else:
        what = f"{type(failure).__name__}: {_first_line(failure)}"
    log = str(run_folder / "logs" / "driver.log")
    return error_fields(ClusterError(what, where=log, fix="read that log"), None, trace)


def _describe_worker(failures: dict[int, Exception], run_folder: Path) -> dict[str, Any]:
    """The failure of the worker that failed first, as far as that can be told.

    A lost process comes first: what the others then raise (a broken connection) follows from it.
    """
    lost = [rank for rank in failures if not isinstance(failures[rank], WorkerError)]
    rank = min(lost or failures)
    failure = failures[rank]
    if isinstance(failure, WorkerError):
        what, trace = str(failure), failure.trace
    else:
        what = f"rank {rank}: its process was lost (killed, out of memory, or its node went away)"
        trace = str(failure)
    log = run_folder / "logs" / f"rank-{rank}.log"
    fix = "read that log; started again, the run goes on from its newest checkpoint"
    return error_fields(ClusterError(what, where=str(log), fix=fix), rank, trace)


def _first_line(failure: BaseException) -> str:
    return (str(failure).strip().splitlines() or [type(failure).__name__])[0]


if __name__ == "__main__":
    # Under its real name: what it defines travels to workers by reference, not by value.
    from posttrain_launch.ray_job import main as run_main

    run_main()
