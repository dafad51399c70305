"""Which checkpoint a run goes on from, and whether it fits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from posttrain_dist.checkpoint.store import Manifest, read_manifest, whole_checkpoints
from posttrain_dist.errors import CheckpointError


def find(resume: str, run_folder: Path) -> Path | None:
    """The checkpoint to go on from; None: start at step 0.

    Args:
        resume: `auto` (newest whole one of this run), `never`, a `step-N` folder, or another
            run's folder (its newest).

    Raises:
        CheckpointError: a named checkpoint is not there or not whole.
    """
    if resume == "never":
        return None
    if resume == "auto":
        found = whole_checkpoints(run_folder)
        return found[-1] if found else None
    # A restarted worker goes on from this run's own newest checkpoint, not from the named one.
    own = whole_checkpoints(run_folder)
    if own:
        return own[-1]
    named = Path(resume)
    inside = whole_checkpoints(named)
    if inside:
        return inside[-1]
    read_manifest(named)
    return named


def check_fits(folder: Path, layout: dict[str, Any], channels: list[str]) -> Manifest:
    """The manifest of `folder`, if a run of this layout can read it.

    Raises:
        CheckpointError: it was written by another layout or with other channels.
    """
    manifest = read_manifest(folder)
    if manifest.layout != layout:
        raise CheckpointError(
            f"was written with {_say(manifest.layout)}; this run has {_say(layout)}",
            where=str(folder),
            fix="use the same engine, number of workers and dtype, or train.resume=never",
        )
    if manifest.channels != channels:
        raise CheckpointError(
            f"was written with channels {manifest.channels}; this run's data has {channels}",
            where=str(folder),
            fix="resume with the same data, or train.resume=never",
        )
    return manifest


def _say(layout: dict[str, Any]) -> str:
    return ", ".join(f"{key}={value}" for key, value in layout.items())
