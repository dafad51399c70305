"""MANIFEST.json of a checkpoint: what it is, and what every file in it must be.

The recipe decides whether a run may go on from a checkpoint, the layout only how its state is read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from posttrain_dist.errors import CheckpointError
from posttrain_dist.files import FileDigest
from posttrain_dist.models.folder import NO_NETWORK

MANIFEST = "MANIFEST.json"
TRAINED = "trained.safetensors"  # in `state/` of a checkpoint by parameter name
FORMAT = 5
READABLE = (4, FORMAT)
WITH_NETWORK = 5  # first format that has `recipe.model`, of a run with prepared/served.json
WITHOUT_DIGEST = (1, 2, 3)  # formats whose manifest has none of itself


def with_network(config: Mapping[str, Any], network: Mapping[str, Any]) -> dict[str, Any]:
    """config.json as it is now, with the network that a recipe has; empty: as it is."""
    if not network:
        return dict(config)
    return {**network, **{key: value for key, value in config.items() if key in NO_NETWORK}}


@dataclass(frozen=True, slots=True)
class Recipe:
    """What the training is: another one is another run, whatever runs it."""

    channels: list[str]  # names, in the order of their ids
    settings: dict[str, str] = field(default_factory=dict)  # config key -> value; "data": a digest
    # config.json of the model, as far as it decides the network; empty in older checkpoints.
    model: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Layout:
    """How the state is spread over files, and by what it can be read."""

    engine: str  # single, zero0 ... zero3
    workers: int
    dtype: str  # of the parameters: bfloat16, float32

    def __str__(self) -> str:
        return ", ".join(f"{key}={value}" for key, value in asdict(self).items())


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a checkpoint is, written after everything else in it."""

    step: int
    recipe: Recipe
    layout: Layout
    # Config key -> value, of what may change when a run goes on, and is then said.
    settings: dict[str, str] = field(default_factory=dict)
    lineage: dict[str, Any] = field(default_factory=dict)  # hashes, W&B id
    files: dict[str, FileDigest] = field(default_factory=dict)  # path below the folder
    format: int = FORMAT

    @property
    def by_name(self) -> bool:
        """Whether the state is what is trained, by parameter name: any layout reads it."""
        return f"state/{TRAINED}" in self.files

    def to_json(self) -> str:
        """The text of MANIFEST.json, with a digest of itself: an edit of it is seen."""
        values = asdict(self)
        return json.dumps({**values, "digest": _digest(values)}, indent=1)


def _digest(values: dict[str, Any]) -> str:
    """Of a manifest's values, however they are laid out as text."""
    content = {key: value for key, value in values.items() if key != "digest"}
    return xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True).encode())


def fault_of(folder: Path) -> str:
    """What is wrong with a checkpoint, as far as its manifest, names and sizes tell; "": nothing.

    Cheap: no content is read; `store.damage_of` does that.
    """
    try:
        values = json.loads((folder / MANIFEST).read_bytes())
        files = values["files"].items()
        if fault := _fault_of_values(values, folder.name):
            return fault
        for name, file in files:
            if fault := _fault_of_size(folder / name, _size(file)):
                return f"{name} {fault}"
    except OSError as error:
        return f"{MANIFEST} cannot be read: {error.strerror}"
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return f"{MANIFEST} is no whole manifest"
    return ""


def _fault_of_values(values: dict[str, Any], folder_name: str) -> str:
    written = values["format"]
    if written not in WITHOUT_DIGEST and values["digest"] != _digest(values):
        return f"{MANIFEST} was changed after it was written"
    if written in READABLE and is_step_name(folder_name):
        step = _parse(values).step
        return "" if folder_name == step_name(step) else f"{MANIFEST} is of step {step}"
    return ""


def _fault_of_size(path: Path, size: int) -> str:
    try:
        found = path.stat().st_size
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    return "" if found == size else f"has {found} bytes, and {size} were written"


def _size(file: Any) -> int:
    """Bytes of a file; formats 1 and 2 had nothing else of it, and are refused by their format."""
    return int(file["bytes"] if isinstance(file, dict) else file)


def is_whole(folder: Path) -> bool:
    """Whether `fault_of` finds nothing wrong."""
    return not fault_of(folder)


def step_name(step: int) -> str:
    """The name of the folder of a step's checkpoint."""
    return f"step-{step:06d}"


def is_step_name(name: str) -> bool:
    """Whether a folder is named as a checkpoint of a run."""
    return name.startswith("step-") and name.removeprefix("step-").isdecimal()


def newest_step(run_folder: Path) -> int:
    """Step of a run's newest checkpoint that `fault_of` finds nothing wrong with; 0: none."""
    found = (run_folder / "checkpoints").glob("step-*")
    newest_first = sorted(
        (path for path in found if is_step_name(path.name)),
        key=lambda path: int(path.name.removeprefix("step-")),
        reverse=True,
    )
    whole = (path for path in newest_first if is_whole(path))
    return next((int(path.name.removeprefix("step-")) for path in whole), 0)


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a whole checkpoint.

    Raises:
        CheckpointError: it is not whole, or another version wrote it.
    """
    if fault := fault_of(folder):
        raise CheckpointError(
            f"is no whole checkpoint: {fault}",
            where=str(folder),
            fix="give another step-N folder; `ls` its parent for what there is",
        )
    values = json.loads((folder / MANIFEST).read_bytes())
    if values.get("format") not in READABLE:
        raise CheckpointError(
            f"has format {values.get('format')}, this version reads {FORMAT}",
            where=str(folder),
            fix="use the version that wrote it",
        )
    return _parse(values)


def _parse(values: dict[str, Any]) -> Manifest:
    """A manifest of a format that is read."""
    content = {key: value for key, value in values.items() if key != "digest"}
    content["recipe"] = Recipe(**content["recipe"])
    content["layout"] = Layout(**content["layout"])
    content["files"] = {name: FileDigest(**file) for name, file in content["files"].items()}
    content["step"] = int(content["step"])
    return Manifest(**content)
