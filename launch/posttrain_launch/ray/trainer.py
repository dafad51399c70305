"""The training of a Ray job: Ray Train places the workers, restarts them, and says what failed."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayActorError
from ray.train import (
    BackendConfig,
    ControllerError,
    FailureConfig,
    ScalingConfig,
    TrainingFailedError,
    UserCallback,
    WorkerGroupError,
)
from ray.train import RunConfig as RayRunConfig
from ray.train.backend import Backend

from posttrain_dist.attempts.train_apart import killed
from posttrain_dist.config import Ray, RunConfig, Slurm
from posttrain_dist.errors import ClusterError, ClusterLost, OutOfMemory, is_out_of_memory
from posttrain_dist.rehearsal.out_of_memory import advice
from posttrain_launch.ray import private_names
from posttrain_launch.ray.child import quiet_environment
from posttrain_launch.ray.placement import Places
from posttrain_launch.ray.workers import WorkerError, train_worker

LOOK_FOR_S = 15.0  # in which Ray notices that a node is gone
CONTROLLER_RETRIES = 4  # of a minute each, for workers to find their places after a lost node


def fit(config: RunConfig, run_folder: Path, places: Places, *, here: bool) -> None:
    """Train on Ray workers; returns when all of them have.

    Args:
        config: of the run; `config.cluster` is Ray or Slurm.
        run_folder: shared by all nodes.
        places: of the workers, which fit on the cluster.
        here: all of them on this machine.

    Raises:
        WorkerError: with an error for the user; a worker's own where it is one.
    """
    cluster = config.cluster
    assert isinstance(cluster, Ray)
    trainer = _trainer(
        train_worker,
        train_loop_config={"config": config.to_yaml(), "run_folder": str(run_folder)},
        scaling_config=ScalingConfig(
            num_workers=places.workers,
            use_gpu=places.use_gpu,
            resources_per_worker=places.bundle,
            placement_strategy=places.strategy.value,
            label_selector=places.labels or None,
        ),
        run_config=RayRunConfig(
            storage_path=str(run_folder / "ray"),
            failure_config=FailureConfig(
                max_failures=cluster.max_failures, controller_failure_limit=CONTROLLER_RETRIES
            ),
            callbacks=[RefuseRetry(config, run_folder)],
            worker_runtime_env={"env_vars": worker_environment(cluster, places.use_gpu, here)},
        ),
    )
    before = alive_nodes()
    try:
        trainer.fit()
    except (TrainingFailedError, RayActorError) as failure:  # the latter: the controller is gone
        error = explain(failure, config, run_folder)
        if not _is_of_input(error):
            error = _of_machines(failure, error, before, run_folder)
        raise error from failure


def worker_environment(cluster: Ray, use_gpu: bool, here: bool) -> dict[str, str]:
    """Variables that a worker has from its first moment, before it imports torch."""
    environment = quiet_environment()
    environment["OMP_NUM_THREADS"] = str(max(1, int(cluster.cpus_per_worker)))
    if not use_gpu:
        environment["DS_ACCELERATOR"] = "cpu"
    if here and sys.platform == "linux":
        # Else the one that the host's name resolves to, and whatever NCCL finds first.
        environment["GLOO_SOCKET_IFNAME"] = "lo"
        environment["NCCL_SOCKET_IFNAME"] = os.environ.get("NCCL_SOCKET_IFNAME", "lo")
    if isinstance(cluster, Slurm) and cluster.network_interface:
        environment["GLOO_SOCKET_IFNAME"] = cluster.network_interface
        environment["NCCL_SOCKET_IFNAME"] = cluster.network_interface
    return environment | cluster.environment


def _trainer(loop: Callable[[dict[str, Any]], None], **given: Any) -> Any:
    """Ray Train's trainer, without the processes that are of no use where that is known to work."""
    if private_names.are_used():
        from posttrain_launch.ray.lean_trainer import LeanTrainer

        return LeanTrainer(loop, backend_config=PlainConfig(), **given)
    from ray.train.torch import TorchTrainer

    return TorchTrainer(loop, torch_config=PlainConfig(), **given)


class PlainBackend(Backend):  # type: ignore[misc]
    """Processes and nothing else: the library makes its own process group.

    Ray Train's TorchConfig would make one, and for it import torch in the job and in the controller
    too, which takes seconds of the way to the first step.
    """

    share_cuda_visible_devices = True  # as with TorchConfig: a worker's GPU is its local rank


class PlainConfig(BackendConfig):  # type: ignore[misc]
    """Chooses PlainBackend."""

    backend = "plain"  # TorchTrainer looks for a name here

    @property
    def backend_cls(self) -> type[Backend]:
        """The backend."""
        return PlainBackend


class RefuseRetry(UserCallback):  # type: ignore[misc]
    """Ends the run at once when a worker meets an error that the user has to fix.

    What a callback raises is an error of the controller, and Ray Train retries only those of
    workers: training again on the same bad input, or in the same memory, would fail again.
    """

    def __init__(self, config: RunConfig, run_folder: Path) -> None:
        self._config, self._run_folder = config, run_folder

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Raise the first worker's failure that carries a user's error."""
        found = [
            error
            for rank, failure in sorted(worker_exceptions.items())
            if (error := _of_user(rank, failure, self._config, self._run_folder)) is not None
        ]
        # Where one has no memory for a save, the others say that there is none.
        for error in sorted(found, key=lambda each: not isinstance(each.error, OutOfMemory)):
            raise error


def _of_user(
    rank: int, failure: Exception, config: RunConfig, run_folder: Path
) -> WorkerError | None:
    """A worker's failure with an error for the user: its own, or that its host had no memory."""
    if isinstance(failure, WorkerError):
        return failure if failure.error is not None else None
    # Ray's monitor ends a process before the kernel would, and says so.
    if not is_out_of_memory(getattr(failure, "health_check_failure", failure)):
        return None
    error = killed(config, run_folder, rank=rank)
    return WorkerError(rank, error.what, str(failure), error)


def explain(
    failure: TrainingFailedError | RayActorError, config: RunConfig, run_folder: Path
) -> WorkerError:
    """Ray Train's failure as one line, with the rank that failed first as far as is known.

    Where a process of Ray's own is gone, its controller above all, that is one of the machines: no
    input makes it, and started again the run goes on.
    """
    if isinstance(failure, ControllerError):
        cause = failure.controller_failure
        if isinstance(cause, WorkerError):
            return cause
    elif isinstance(failure, WorkerGroupError):
        return _explain_workers(failure.worker_failures, config, run_folder)
    else:
        cause = failure
    text = (str(cause).strip().splitlines() or [type(cause).__name__])[0]
    log = str(run_folder / "logs" / "driver.log")
    error = ClusterError(f"Ray Train failed: {text}", where=log, fix="read that log")
    if isinstance(cause, RayActorError) and not cause.actor_init_failed:
        error = ClusterLost(
            "a process of Ray that drives the workers was lost (killed, perhaps by the kernel for "
            "memory, or its node went)",
            where=log,
            fix=f"`posttrain run {run_folder}` goes on from the newest checkpoint",
        )
    return WorkerError(None, text, str(failure), error)


# --------------------------------------------------------------------- machines that are gone


def alive_nodes() -> dict[str, str]:
    """Id -> name of the nodes of Ray that are alive."""
    return {n["NodeID"]: n["NodeManagerHostname"] for n in ray.nodes() if n["Alive"]}


def _is_of_input(error: WorkerError) -> bool:
    """Whether it is one that starting again cannot cure; a failed Ray Train is a ClusterError."""
    return error.error is not None and not isinstance(error.error, ClusterError)


def _of_machines(
    failure: TrainingFailedError | RayActorError,
    error: WorkerError,
    before: dict[str, str],
    run_folder: Path,
) -> WorkerError:
    """The failure as one of the machines, where they are why it failed: the run may go on."""
    cause = failure.controller_failure if isinstance(failure, ControllerError) else failure
    gone = _gone(before, LOOK_FOR_S if "node" in str(failure).lower() else 0.0)
    if gone:
        names = ", ".join(gone)
        what = f"lost the node {names}" if len(gone) == 1 else f"lost the nodes {names}"
        what += ", and its workers found no other place"
    elif type(cause).__name__ == "WorkerGroupStartupTimeoutError":
        what = "has had no free place for the workers for minutes: others hold it"
    else:
        return error
    lost = ClusterLost(
        what,
        where="the Ray cluster",
        fix=f"`posttrain run {run_folder}` goes on from the newest checkpoint once there is room; "
        "cluster.max_failures says how often Ray itself tries again",
    )
    return WorkerError(None, what, error.trace, lost)


def _gone(before: dict[str, str], wait_s: float) -> list[str]:
    """Names of nodes that were there; Ray may notice a while after their workers are missed."""
    deadline = time.monotonic() + wait_s
    while True:
        now = alive_nodes()
        gone = [name for node, name in before.items() if node not in now]
        if gone or time.monotonic() >= deadline:
            return gone
        time.sleep(0.5)


# ------------------------------------------------------------------------- workers that failed


def _explain_workers(
    failures: dict[int, Exception], config: RunConfig, run_folder: Path
) -> WorkerError:
    # A lost process comes first: what the others then raise, a broken connection, follows from it.
    lost = [rank for rank in failures if not isinstance(failures[rank], WorkerError)]
    rank = min(lost or failures)
    failure = failures[rank]
    if isinstance(failure, WorkerError):
        text, trace = failure.text, failure.trace
    else:
        text = "its process was lost (killed, perhaps by the kernel for memory, or its node went)"
        trace = str(failure)
    fix = "read that log; started again, the run goes on from its newest checkpoint"
    if rank in lost:
        fix += f"; if it was for memory (dmesg), {advice(config, run_folder)}"
    log = run_folder / "logs" / f"rank-{rank}.log"
    error = ClusterError(f"rank {rank}: {text}", where=str(log), fix=fix)
    return WorkerError(rank, text, trace, error)
