"""The training of a Ray job: Ray Train places the workers, restarts them, and says what failed."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from ray.train import FailureConfig, ScalingConfig, UserCallback
from ray.train import RunConfig as RayRunConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2.api.exceptions import ControllerError, TrainingFailedError, WorkerGroupError

from posttrain_dist.config import Ray, RunConfig, Slurm
from posttrain_dist.errors import ClusterError
from posttrain_launch.ray_driver import quiet_environment
from posttrain_launch.ray_worker import WorkerError, train_worker

CONTROLLER_RETRIES = 4  # of a minute each, for workers to find their places after a lost node


def fit(
    config: RunConfig, run_folder: Path, workers: int, *, use_gpu: bool, spread: bool, here: bool
) -> None:
    """Train on `workers` Ray workers; returns when all of them have.

    Args:
        config: of the run; `config.cluster` is Ray or Slurm.
        run_folder: shared by all nodes.
        workers: their number, which fits on the cluster.
        use_gpu: a GPU for each.
        spread: one a node as far as there are nodes, else packed.
        here: all of them on this machine.

    Raises:
        WorkerError: with an error for the user; a worker's own where it is one.
    """
    cluster = config.cluster
    assert isinstance(cluster, Ray)
    per_worker = {"CPU": cluster.cpus_per_worker} | ({"GPU": 1} if use_gpu else {})
    trainer = TorchTrainer(
        train_worker,
        train_loop_config={"config": config.to_yaml(), "run_folder": str(run_folder)},
        scaling_config=ScalingConfig(
            num_workers=workers,
            use_gpu=use_gpu,
            resources_per_worker=per_worker,
            placement_strategy="SPREAD" if spread else "PACK",
        ),
        torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo"),
        run_config=RayRunConfig(
            storage_path=str(run_folder / "ray"),
            failure_config=FailureConfig(
                max_failures=cluster.max_failures, controller_failure_limit=CONTROLLER_RETRIES
            ),
            callbacks=[RefuseRetry()],
            worker_runtime_env={"env_vars": worker_environment(cluster, use_gpu, here)},
        ),
    )
    try:
        trainer.fit()
    except TrainingFailedError as failure:
        raise explain(failure, run_folder) from failure


def worker_environment(cluster: Ray, use_gpu: bool, here: bool) -> dict[str, str]:
    """Variables that a worker has from its first moment, before it imports torch."""
    environment = quiet_environment()
    environment["OMP_NUM_THREADS"] = str(max(1, int(cluster.cpus_per_worker)))
    if not use_gpu:
        environment["DS_ACCELERATOR"] = "cpu"
    if here and sys.platform == "linux":
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
        """Raise the first worker's failure that carries a user's error."""
        for _, failure in sorted(worker_exceptions.items()):
            if isinstance(failure, WorkerError) and failure.error is not None:
                raise failure


def explain(failure: TrainingFailedError, run_folder: Path) -> WorkerError:
    """Ray Train's failure as one line, with the rank that failed first as far as can be told."""
    if isinstance(failure, ControllerError):
        cause = failure.controller_failure
        if isinstance(cause, WorkerError):
            return cause
    elif isinstance(failure, WorkerGroupError):
        return _explain_workers(failure.worker_failures, run_folder)
    else:
        cause = failure
    text = (str(cause).strip().splitlines() or [type(cause).__name__])[0]
    log = run_folder / "logs" / "driver.log"
    error = ClusterError(f"Ray Train failed: {text}", where=str(log), fix="read that log")
    return WorkerError(None, text, str(failure), error)


def _explain_workers(failures: dict[int, Exception], run_folder: Path) -> WorkerError:
    # A lost process comes first: what the others then raise, a broken connection, follows from it.
    lost = [rank for rank in failures if not isinstance(failures[rank], WorkerError)]
    rank = min(lost or failures)
    failure = failures[rank]
    if isinstance(failure, WorkerError):
        text, trace = failure.text, failure.trace
    else:
        text = "its process was lost (killed, out of memory, or its node went away)"
        trace = str(failure)
    error = ClusterError(
        f"rank {rank}: {text}",
        where=str(run_folder / "logs" / f"rank-{rank}.log"),
        fix="read that log; started again, the run goes on from its newest checkpoint",
    )
    return WorkerError(rank, text, trace, error)
