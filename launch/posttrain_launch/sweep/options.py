"""Options of `hydra/launcher`: where the trials of a sweep run. Hydra's own `basic` has none."""

from __future__ import annotations

from dataclasses import dataclass

from hydra.core.config_store import ConfigStore


@dataclass(slots=True)
class SlurmArray:
    """`hydra/launcher=slurm_array`: one job array, each trial a job of cluster.nodes nodes."""

    at_once: int | None = None  # jobs that run at a time; null: as many as Slurm has room for
    wait: bool = True  # false: leave once they are submitted; `posttrain run <sweep>` comes back


@dataclass(slots=True)
class OnRay:
    """`hydra/launcher=ray`: trials packed on the free CPUs and GPUs of a Ray cluster."""

    at_once: int | None = None  # trials at a time; null: as many as find a place
    retries: int = 1  # times that a trial is started again after its machines failed
    share_gpus: bool = True  # trials of one worker share a GPU where their plans fit beside others


def register_launchers() -> None:
    """Give Hydra the options."""
    store = ConfigStore.instance()
    for name, node in (("slurm_array", SlurmArray), ("ray", OnRay)):
        store.store(group="hydra/launcher", name=name, node=node, provider="posttrain")
