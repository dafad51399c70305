"""MANIFEST.json of a checkpoint: what it is, and what every file in it must be.

The recipe decides whether a run may go on from a checkpoint, the layout only how its state is read.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from posttrain_dist.errors import CheckpointError
from posttrain_dist.files import FileDigest

MANIFEST = "MANIFEST.json"
FORMAT = 3


@dataclass(frozen=True, slots=True)
class Recipe:
    """What the training is: another one is another run, whatever runs it."""

    channels: list[str]  # names, in the order of their ids
    settings: dict[str, str] = field(default_factory=dict)  # config key -> value; "data": a digest


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
    lineage: dict[str, Any] = field(default_factory=dict)  # hashes, W&B id
    files: dict[str, FileDigest] = field(default_factory=dict)  # path below the folder
    format: int = FORMAT

    def to_json(self) -> str:
        """The text of MANIFEST.json."""
        return json.dumps(asdict(self), indent=1)


def is_whole(folder: Path) -> bool:
    """Whether `folder` holds a manifest and every file that it names, in its size.

    Cheap: no content is read; `store.verify` does that.
    """
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        return all((folder / name).stat().st_size == _size(file) for name, file in files.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _size(file: Any) -> int:
    """Bytes of a file; formats 1 and 2 had nothing else of it, and are refused by their format."""
    return int(file["bytes"] if isinstance(file, dict) else file)


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a whole checkpoint.

    Raises:
        CheckpointError: it is not whole, or another version wrote it.
    """
    if not is_whole(folder):
        raise CheckpointError(
            "is no whole checkpoint: MANIFEST.json or a file that it names is missing or cut",
            where=str(folder),
            fix="give another step-N folder; `ls` its parent for what there is",
        )
    values = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    if values.get("format") != FORMAT:
        raise CheckpointError(
            f"has format {values.get('format')}, this version reads {FORMAT}",
            where=str(folder),
            fix="use the version that wrote it",
        )
    values["recipe"] = Recipe(**values["recipe"])
    values["layout"] = Layout(**values["layout"])
    values["files"] = {name: FileDigest(**file) for name, file in values["files"].items()}
    return Manifest(**values)
