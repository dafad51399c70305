"""What a command would trip over later, found before it makes anything.

Imports no torch, unless an adapter is read that the training goes on with.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from posttrain_dist.checkpoint import resume
from posttrain_dist.config import AutoTuning, Ray, RunConfig, Slurm, problems
from posttrain_dist.config.cluster import Cluster
from posttrain_dist.config.hardware import with_nodes
from posttrain_dist.config.ray_rules import is_job_api, job_api
from posttrain_dist.config.reference_rules import check_named_reference, reference_alone_problems
from posttrain_dist.config.rules import single_on_many
from posttrain_dist.config.this_machine import check_hardware
from posttrain_dist.data.sources import file_sets
from posttrain_dist.engine import Single
from posttrain_dist.errors import ConfigError, PosttrainError, SeveralErrors, raise_all
from posttrain_dist.metrics.wandb_sink import resolve_mode
from posttrain_dist.models import Weights
from posttrain_dist.models.architectures.positions import check_row_length
from posttrain_dist.models.classifier import check_kind
from posttrain_dist.models.folder import check_folder, resolve
from posttrain_dist.models.quantized import check_base
from posttrain_dist.tuning.base import AdapterTuning


def check_inputs(config: RunConfig, verb: str = "train") -> None:
    """Refuse a config that contradicts itself or names files that cannot be used.

    Args:
        config: with every slot filled and paths that do not depend on the working directory.
        verb: train, submit, inspect, evaluate or plan; only what it uses is looked at.

    Raises:
        PosttrainError, SeveralErrors: all that is wrong, together.
    """
    raise_all(input_problems(config, verb))


def input_problems(config: RunConfig, verb: str = "train") -> list[PosttrainError]:
    """Every fault that can be seen without reading rows or weights; see `check_inputs`."""
    found = problems(config)
    if verb == "submit" and not getattr(config.cluster, "shared_folders", True):
        return found + _cluster_faults(config, verb)  # its files are elsewhere, and looked at there
    trains = verb != "evaluate"
    if not trains:
        found += reference_alone_problems(config)
    found += _faults(lambda: _check_model(config, trains=trains, plans=verb == "plan"))
    if verb != "plan":
        found += _data_faults(config, only_heldout=verb == "evaluate")
    if verb in ("train", "submit"):
        found += _faults(lambda: _check_init_from(config))
        found += _faults(lambda: check_named_reference(config))
        found += _cluster_faults(config, verb)
        found += _faults(lambda: _check_resume(config.train.resume))
        found += _faults(lambda: resolve_mode(config.logging.wandb))
        found += _faults(lambda: _check_output_root(Path(config.output_root)))
    return found


def _faults(check: Callable[[], object]) -> list[PosttrainError]:
    try:
        check()
    except SeveralErrors as several:
        return several.problems
    except PosttrainError as error:
        return [error]
    return []


def _check_model(config: RunConfig, *, trains: bool, plans: bool) -> None:
    folder, fresh = resolve(config.model.path), config.model.weights is Weights.random
    model = check_folder(folder, need_weights=not (fresh or plans))
    adapters = isinstance(config.tuning, AdapterTuning | AutoTuning) or not trains
    check_base(model, folder, adapters=adapters, fresh=fresh)
    check_kind(model, folder, scalar=config.objective.own_rows)
    check_row_length(model, config.data.max_length, config.tuning.virtual_tokens)
    config.tuning.check_network(model)


def _check_init_from(config: RunConfig) -> None:
    """The adapter that the training goes on with is whole, of this base model and this tuning."""
    tuning = config.tuning
    if isinstance(tuning, AdapterTuning) and tuning.init_from is not None:
        from posttrain_dist.tuning.adapters import base_check
        from posttrain_dist.tuning.adapters.adapter_folder import read_adapter

        base, adapter = resolve(config.model.path), Path(tuning.init_from)
        base_check.check_base(adapter, base)
        base_check.check_tokens(adapter, base, config.model.add_tokens)
        tuning.from_adapter(read_adapter(adapter), check_folder(base, need_weights=False))


def _data_faults(config: RunConfig, only_heldout: bool) -> list[PosttrainError]:
    try:
        sets = file_sets(config.data, config.objective.rows, only_heldout=only_heldout)
    except PosttrainError as error:
        return [error]
    found: list[PosttrainError] = []
    for each in sets:
        found += _faults(lambda each=each: each.files)  # type: ignore[misc]
    return found


def _cluster_faults(config: RunConfig, verb: str) -> list[PosttrainError]:
    cluster = with_nodes(config.cluster, config.hardware)
    found: list[PosttrainError] = []
    if verb == "train" and isinstance(cluster, Slurm):
        what = "slurm: a training on Slurm is submitted, not started here"
        fix = "posttrain submit with the same arguments"
        found.append(ConfigError(what, where="cluster", fix=fix))
    if verb == "submit" and not isinstance(cluster, Ray):
        what = "a job is submitted to Slurm or to a Ray that runs, and this run trains here"
        fix = "use cluster=slurm and, for instance, cluster.nodes=2; or cluster=ray and "
        fix += "cluster.address=http://HOST:8265"
        found.append(ConfigError(what, where="cluster", fix=fix))
    found += _address_faults(cluster, verb)
    if verb == "train":
        found += _faults(lambda: check_hardware(config.hardware, cluster))
    if isinstance(cluster, Slurm) and verb == "submit":
        found += _missing_resources(cluster)
    if isinstance(cluster, Slurm) and isinstance(config.engine, Single):
        workers = cluster.nodes * max(1, cluster.gpus_per_node or 0)
        if cluster.workers is None and workers > 1:
            found.append(single_on_many(workers))
    return found


def _address_faults(cluster: Cluster, verb: str) -> list[PosttrainError]:
    """Jobs go to the HTTP address of a Ray, trainings to the port where its nodes join."""
    if not isinstance(cluster, Ray) or isinstance(cluster, Slurm):
        return []
    if verb == "submit":
        return _faults(lambda: job_api(cluster.address))
    if is_job_api(cluster.address or ""):
        what = f"is {cluster.address}, the job API of a Ray, which takes jobs and no drivers"
        fix = "posttrain submit with the same arguments; on a node of the cluster, HOST:PORT"
        return [ConfigError(what, where="cluster.address", fix=fix)]
    return []


def _missing_resources(cluster: Slurm) -> list[PosttrainError]:
    """What a job asks for and nobody can guess: a wrong one shows after hours in a queue."""
    missing = {
        "cluster.gpus_per_node": (cluster.gpus_per_node, "8, or 0 for a job on CPUs"),
        "cluster.time": (cluster.time, "08:00:00, the time that the job may take"),
    }
    keys = [key for key, (value, _) in missing.items() if value is None]
    if not keys:
        return []
    fix = "set " + "; ".join(f"{key}=<{missing[key][1]}>" for key in keys)
    if cluster.gpus_per_node is None:
        fix += "; or say what the nodes are, such as hardware=h100x8"
    what = "is not set, and has no default" + (f"; nor is {keys[1]}" if len(keys) > 1 else "")
    return [ConfigError(what, where=keys[0], fix=fix)]


def _check_resume(named: str) -> None:
    if named not in ("auto", "never"):
        resume.check_named(Path(named))


def _check_output_root(root: Path) -> None:
    there = next(place for place in (root, *root.parents) if os.access(place, os.F_OK))
    if not (there.is_dir() and os.access(there, os.W_OK | os.X_OK)):
        raise ConfigError(
            f"the run folder cannot be made in {root}: {there} is no folder that can be written to",
            where="output_root",
            fix="set output_root=<a folder that you may write to>",
        )
