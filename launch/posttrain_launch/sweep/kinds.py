"""Which backends and searches there are: Hydra's `hydra/launcher` and `hydra/sweeper` by name.

Hydra's own `basic` of both has no options here.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from types import ModuleType

from hydra.core.config_store import ConfigStore

# Name of the option -> the module that makes it, imported where it is used.
BACKENDS = {
    "basic": "posttrain_launch.sweep.backends.basic",
    "slurm_array": "posttrain_launch.sweep.backends.slurm_array",
    "ray": "posttrain_launch.sweep.backends.on_ray",
}
SEARCHES = {
    "basic": "posttrain_launch.sweep.combinations",
    "posttrain_optuna": "posttrain_launch.sweep.search.study",
}


def backend_module(name: str) -> ModuleType:
    """The module of a backend: `restore(sweep, options)`, and perhaps, for the config of a trial
    before and after it is planned, `prepare(config)` and `adjust(options)`."""
    return importlib.import_module(BACKENDS[name])


def search_module(name: str) -> ModuleType:
    """The module of a search: `plan(sweeper, overrides)`, `restore(sweep)`."""
    return importlib.import_module(SEARCHES[name])


# ------------------------------------------------------------------------------------ options


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
