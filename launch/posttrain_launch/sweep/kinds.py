"""Which backends and searches there are: Hydra's `hydra/launcher` and `hydra/sweeper` by name."""

from __future__ import annotations

import importlib
from types import ModuleType

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
    """The module of a backend: `options`, `restore(sweep, options)`."""
    return importlib.import_module(BACKENDS[name])


def search_module(name: str) -> ModuleType:
    """The module of a search: `plan(sweeper, overrides)`, `restore(sweep)`."""
    return importlib.import_module(SEARCHES[name])
