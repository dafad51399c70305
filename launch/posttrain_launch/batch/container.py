"""How the processes of a job are run inside an image: options of srun, or a command before them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from posttrain_dist.config import RunConfig, Slurm
from posttrain_dist.config.cluster import ContainerRuntime
from posttrain_dist.errors import ConfigError
from posttrain_dist.objectives.reference_choice import Referenced
from posttrain_dist.tuning.base import AdapterTuning

# Ray's sockets: two steps of a job on one node meet there.
_SHARED = ("/tmp",)


def srun_options(config: RunConfig, run_folder: Path) -> list[str]:
    """Options of every srun whose processes run in the image; none without one."""
    cluster = config.cluster
    if not isinstance(cluster, Slurm) or cluster.container is None:
        return []
    if cluster.container_runtime is not ContainerRuntime.pyxis:
        return []
    return [
        f"--container-image={cluster.container}",
        f"--container-mounts={','.join(_pairs(mounts(config, run_folder)))}",
        f"--container-workdir={run_folder}",
    ]


def command_prefix(config: RunConfig, run_folder: Path) -> list[str]:
    """The command that runs another one in the image; empty without one."""
    cluster = config.cluster
    if not isinstance(cluster, Slurm) or cluster.container is None:
        return []
    if cluster.container_runtime is not ContainerRuntime.apptainer:
        return []
    gpus = ["--nv"] if cluster.gpus_per_node else []
    binds = [f"--bind={mount}" for mount in mounts(config, run_folder)]
    return ["apptainer", "exec", *gpus, *binds, f"--pwd={run_folder}", cluster.container]


def mounts(config: RunConfig, run_folder: Path) -> list[str]:
    """Folders that the image must show: all that the run reads and writes, then the user's own.

    A folder below another one is left out: it is seen with that.

    Raises:
        ConfigError: the name of a folder cannot stand in a mount.
    """
    cluster = config.cluster
    assert isinstance(cluster, Slurm)
    needed = {str(place) for place in _needed(config, run_folder)} | set(_SHARED)
    for place in sorted(needed):
        if set(place) & set(",:") or not place.isprintable():
            raise ConfigError(
                f"must show {place} inside, and no mount can have a ',' or ':' in its name",
                where="cluster.container",
                fix="rename that folder, or name it by a link without them",
            )
    own = [mount for mount in cluster.container_mounts if mount not in needed]
    covered = {mount for mount in cluster.container_mounts if ":" not in mount}

    def is_seen(place: str) -> bool:
        above = {str(parent) for parent in Path(place).parents} - {"/"}
        return bool(above & (needed | covered))

    return [*sorted(place for place in needed if not is_seen(place)), *own]


def _needed(config: RunConfig, run_folder: Path) -> Iterator[Path]:
    yield run_folder
    tuning, data = config.tuning, config.data
    named = [
        config.output_root,
        config.model.path,
        data.train,
        data.eval,
        data.cache,
        config.train.resume,
    ]
    named += [config.template.name, *(source.path for source in data.sources.values())]
    if isinstance(tuning, AdapterTuning):
        named.append(tuning.init_from)
    if isinstance(config.objective, Referenced):
        named.append(config.objective.reference_model)
    for path in named:
        if path and path.startswith("/"):  # else it is a name, such as tiny_base or hf:…
            yield from _folders_of(path)


def _folders_of(path: str) -> Iterator[Path]:
    """The folder itself, or that of a file or a pattern; and those that its links lead to."""
    place = Path(path)
    while any(letter in str(place) for letter in "*?[") or place.is_file():
        place = place.parent
    yield place
    if place.is_dir():  # the hub's cache: snapshots/ holds links into blobs/
        yield from {each.resolve().parent for each in place.iterdir() if each.is_symlink()}


def _pairs(places: list[str]) -> list[str]:
    """pyxis wants both sides of a mount."""
    return [place if ":" in place else f"{place}:{place}" for place in places]
