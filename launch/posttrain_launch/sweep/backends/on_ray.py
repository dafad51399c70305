"""`hydra/launcher=ray`: trials packed on the free CPUs and GPUs of a Ray cluster.

Each trial is a process here, `posttrain run <trial folder> --address …`, that is started once the
cluster has room for its workers. The cluster is the one of cluster.address or RAY_ADDRESS, else a
Ray of this sweep's own.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from posttrain_dist.config import Ray, RunConfig, Slurm
from posttrain_dist.engine import Single
from posttrain_dist.errors import ConfigError
from posttrain_dist.planner.plan import Choice
from posttrain_launch.sweep.backends.packing import Bundle, Room, fits, total_of
from posttrain_launch.sweep.backends.processes import Processes
from posttrain_launch.sweep.backends.ray_cluster import RayCluster
from posttrain_launch.sweep.folder import Sweep, Trial
from posttrain_launch.sweep.states import is_driven

MOST_PER_GPU = 8  # trials: each has its own copy of the frozen weights and its own CUDA context


def restore(sweep: Sweep, options: Mapping[str, Any], *, debug: bool = False) -> OnRay:
    """The backend of a sweep."""
    return OnRay(sweep, at_once=options["at_once"], retries=options["retries"], debug=debug)


def prepare(config: RunConfig) -> RunConfig:
    """The config of a trial: of one worker, where it cannot have more and no number was named."""
    cluster = config.cluster
    if not isinstance(cluster, Ray) or isinstance(cluster, Slurm):
        raise ConfigError(
            f"is {type(cluster).__name__.lower()}, and the trials run on a Ray cluster",
            where="cluster",
            fix="leave cluster out, or set cluster=ray; for Slurm hydra/launcher=slurm_array",
        )
    if cluster.workers is None and isinstance(config.engine, Single):
        return dataclasses.replace(config, cluster=dataclasses.replace(cluster, workers=1))
    return config


def adjust(options: Mapping[str, Any]) -> Callable[[RunConfig, Choice | None], RunConfig]:
    """What makes the config of a trial one that shares a GPU, where its plan says that it can."""

    def share(config: RunConfig, choice: Choice | None) -> RunConfig:
        cluster = config.cluster
        assert isinstance(cluster, Ray)
        plan = None if choice is None else choice.chosen.plan
        is_small = cluster.workers == 1 and cluster.gpus_per_worker == 1.0
        if options["share_gpus"] and plan is not None and plan.on_gpu and is_small:
            needed = plan.device.total_bytes + plan.margin_bytes
            part = gpu_share(needed, plan.capacity_bytes)
            cluster = dataclasses.replace(cluster, gpus_per_worker=part)
        return dataclasses.replace(config, cluster=cluster)

    return share


def gpu_share(needed_bytes: int, capacity_bytes: int) -> float:
    """The part of a GPU that a worker takes: 1/k where k of them fit, in Ray's steps of 0.0001."""
    count = min(MOST_PER_GPU, capacity_bytes // max(1, needed_bytes))
    return 1.0 if count < 2 else math.floor(10_000 / count) / 10_000


class OnRay:
    """Trials on a Ray cluster.

    Args:
        at_once: trials at a time; None: as many as find a place.
        retries: times that a trial is started again after its machines failed.
    """

    waits = True

    def __init__(
        self, sweep: Sweep, *, at_once: int | None, retries: int, debug: bool = False
    ) -> None:
        self.slots, self.retries = at_once, retries
        self._sweep = sweep
        self._processes = Processes(debug=debug)
        self._cluster: RayCluster | None = None
        self._waiting: list[Trial] = []
        self._bundles: dict[int, list[Bundle]] = {}  # of the trials that run
        self._others: Bundle = {}  # what others hold of the cluster

    def start(self, trials: Sequence[Trial]) -> None:
        """Have trials wait for a place."""
        if self._cluster is None and trials:
            address = given_address(read_config(trials[0]))
            self._cluster = RayCluster.join_or_start(self._sweep.folder, address)
        for trial in trials:
            if is_driven(trial.folder):  # by a process of a driver that was killed: it has a place
                assert self._cluster is not None
                self._bundles[trial.number] = bundles_of(read_config(trial), self._cluster.nodes)
                self._processes.start(trial)
            else:
                self._waiting.append(trial)
        self._start_what_fits()

    def running(self) -> set[int]:
        """Those that run or wait for a place."""
        running = self._processes.running()
        self._bundles = {number: self._bundles[number] for number in running}
        self._start_what_fits()
        return {*self._bundles, *(trial.number for trial in self._waiting)}

    def code(self, number: int) -> int | None:
        """The exit code of a trial that ended."""
        return self._processes.code(number)

    def stop(self) -> None:
        """Have every trial that runs save and leave."""
        self._waiting.clear()
        self._processes.stop()

    def close(self) -> None:
        """End the Ray that was started for this sweep."""
        if self._cluster is not None:
            self._cluster.close()

    def _start_what_fits(self) -> None:
        if not self._waiting or self._cluster is None:
            return
        self._cluster.look()
        nodes, free = self._cluster.nodes, self._cluster.free
        if not self._bundles:
            total = total_of(nodes)
            self._others = {name: total[name] - free.get(name, 0.0) for name in total}
        room = Room(nodes, free, self._bundles.values(), self._others)
        while self._waiting:
            trial = self._waiting[0]
            bundles = bundles_of(read_config(trial), room.nodes)
            # What no cluster of this size can hold is started: it says what is missing.
            if fits(bundles, room.nodes) and not room.take(bundles):
                return
            del self._waiting[0]
            self._bundles[trial.number] = bundles
            self._launch(trial)

    def _launch(self, trial: Trial) -> None:
        assert self._cluster is not None
        logs = trial.folder / "logs"
        logs.mkdir(exist_ok=True)
        with (logs / "terminal.log").open("ab") as output:
            self._processes.start(
                trial,
                ["--address", self._cluster.address],
                output=output,
                environment=self._cluster.environment,
            )


def read_config(trial: Trial) -> RunConfig:
    """The frozen config of a trial."""
    return RunConfig.from_yaml((trial.folder / "config.yaml").read_text(encoding="utf-8"))


def bundles_of(config: RunConfig, nodes: Sequence[Bundle]) -> list[Bundle]:
    """What the workers of a run take, one bundle a worker."""
    cluster = config.cluster
    assert isinstance(cluster, Ray)
    gpus = sum(node.get("GPU", 0.0) for node in nodes)
    bundle = {"CPU": cluster.cpus_per_worker}
    if gpus and cluster.gpus_per_worker:
        bundle["GPU"] = cluster.gpus_per_worker
    default = int(gpus / cluster.gpus_per_worker) if "GPU" in bundle else 1
    return [bundle] * (cluster.workers or default)


def given_address(config: RunConfig) -> str | None:
    """The running Ray that a run is to use, as its driver finds it."""
    cluster = config.cluster
    assert isinstance(cluster, Ray)
    return cluster.address or os.environ.get("RAY_ADDRESS") or None
