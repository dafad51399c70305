"""Which checkpoint a run goes on from, and whether it fits."""

from __future__ import annotations

import logging
from pathlib import Path

from posttrain_dist.checkpoint.manifest import Layout, Manifest, Recipe, read_manifest
from posttrain_dist.checkpoint.store import damaged_since, whole_checkpoints
from posttrain_dist.errors import CheckpointError

_log = logging.getLogger(__name__)


def find(resume: str, run_folder: Path) -> Path | None:
    """The checkpoint to go on from; None: start at step 0.

    Args:
        resume: `auto` (newest whole one of this run), `never`, a `step-N` folder, or another
            run's folder (its newest). A named one starts a run; where the run has a checkpoint of
            its own, that one is newer.

    Raises:
        CheckpointError: a named checkpoint is not there or not whole.
    """
    if resume == "never":
        return None
    own = whole_checkpoints(run_folder)
    for damaged in damaged_since(run_folder, own[-1] if own else None):
        _log.warning("%s is passed over: a file of it is missing or cut", damaged)
    if own:
        _log.info("going on from %s", own[-1])
        return own[-1]
    if resume == "auto":
        return None
    named = Path(resume)
    inside = whole_checkpoints(named)
    if inside:
        return inside[-1]
    read_manifest(named)
    return named


def archive(run_folder: Path) -> None:
    """Move the checkpoints of an earlier training of this folder to `checkpoints.old-N`."""
    old = run_folder / "checkpoints"
    if old.is_dir():
        taken = len(list(run_folder.glob("checkpoints.old-*")))
        old.rename(run_folder / f"checkpoints.old-{taken + 1}")


def check_compatible(folder: Path, recipe: Recipe, layout: Layout, steps: int) -> Manifest:
    """The manifest of `folder`, if this run can go on from it.

    Args:
        recipe: of this run; the checkpoint must have the same.
        layout: of this run; it must be the one that wrote the state.
        steps: of the whole run.

    Raises:
        CheckpointError: it was written by another layout, from other data, or is further on.
    """
    manifest = read_manifest(folder)
    if manifest.layout != layout:
        raise CheckpointError(
            f"was written with {manifest.layout}; this run has {layout}",
            where=str(folder),
            fix="use the same engine, number of workers and dtype, or train.resume=never",
        )
    if manifest.recipe.channels != recipe.channels:
        raise CheckpointError(
            f"was written with channels {manifest.recipe.channels}; this run's data has "
            f"{recipe.channels}",
            where=str(folder),
            fix="resume with the same data, or train.resume=never",
        )
    before = manifest.recipe.settings
    changed = [key for key, value in recipe.settings.items() if before.get(key) != value]
    if changed:
        shown = [f"{key} was {before.get(key)}, now {recipe.settings[key]}" for key in changed]
        raise CheckpointError(
            f"belongs to another order of samples: {'; '.join(shown)}",
            where=str(folder),
            fix="resume with the same values; to train its result on other data, start a new run "
            "with model.path=<that run>/export",
        )
    if manifest.step > steps:
        raise CheckpointError(
            f"is at step {manifest.step}, and this run has {steps} steps",
            where=str(folder),
            fix=f"set train.steps above {manifest.step}, or train.resume=never",
        )
    return manifest
