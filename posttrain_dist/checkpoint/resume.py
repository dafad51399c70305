"""Which checkpoint a run goes on from, and whether it fits."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from posttrain_dist import dist
from posttrain_dist.checkpoint.manifest import Manifest, read_manifest
from posttrain_dist.checkpoint.store import OpenFile, checkpoints, damage_of, whole_checkpoints
from posttrain_dist.errors import CheckpointError

_MISSING = object()
_log = logging.getLogger(__name__)


def choose(
    resume: str, run_folder: Path, open_file: OpenFile, notice: Callable[[str], None]
) -> Path | None:
    """The checkpoint to go on from, compared with its digests; None: start at step 0. Collective.

    Args:
        resume: `auto` (newest whole one of this run), `never`, a `step-N` folder, or another
            run's folder (its newest). A named one starts a run; where the run has a checkpoint of
            its own, that one is newer.
        open_file: of the engines' files.
        notice: called with one line for each newer checkpoint that is passed over, on all ranks.

    Raises:
        CheckpointError: a named checkpoint is not whole, or there are checkpoints and none is.
    """
    if resume == "never":
        return None
    named = None if resume == "auto" else Path(resume)
    for run in (run_folder, named):
        found = dist.from_main(lambda run=run: checkpoints(run)) if run else []  # type: ignore[misc]
        if found:
            return _newest_whole(found, open_file, notice, own=run is run_folder)
    if named is None:
        return None
    dist.on_main(lambda: read_manifest(named))
    if damage := damage_of(named, open_file):
        others = dist.from_main(lambda: [p.name for p in whole_checkpoints(named.parent.parent)])
        others = [name for name in others if name != named.name]
        raise CheckpointError(
            damage,
            where=str(named),
            fix=f"name another one: {', '.join(others)}" if others else "train again from step 0",
        )
    return named


def _newest_whole(
    found: list[Path], open_file: OpenFile, notice: Callable[[str], None], *, own: bool
) -> Path:
    passed_over: dict[Path, str] = {}
    for folder in reversed(found):
        damage = damage_of(folder, open_file)
        if not damage:
            for newer, why in passed_over.items():
                notice(f"{newer} is passed over, going on from {folder.name}: {why}")
            _log.info("going on from %s", folder)
            return folder
        passed_over[folder] = damage
    run_folder = found[0].parent.parent
    again = f"`posttrain run {run_folder} train.resume=never` starts again and keeps them aside"
    raise CheckpointError(
        "no checkpoint is whole: " + "; ".join(f"{p.name}: {w}" for p, w in passed_over.items()),
        where=str(found[0].parent),
        fix=f"{again}; or copy one again" if own else "copy one of them again, or name another run",
    )


def check_named(named: Path) -> None:
    """Refuse a value of `train.resume` that no run can start from, without reading any content.

    Raises:
        CheckpointError: it is neither a whole checkpoint nor a run that has one.
    """
    if not whole_checkpoints(named):
        inside = checkpoints(named)
        read_manifest(inside[-1] if inside else named)


def archive(run_folder: Path, which: list[Path] | None = None) -> dict[Path, Path]:
    """Move checkpoints of an earlier training of this folder to `checkpoints.old-N`.

    Args:
        which: of its checkpoints; None: all, with the folder that they are in.

    Returns:
        Where each was -> where it is.
    """
    old = run_folder / "checkpoints"
    taken = len(list(run_folder.glob("checkpoints.old-*")))
    aside = run_folder / f"checkpoints.old-{taken + 1}"
    if which is None:
        moves = {old: aside} if old.is_dir() else {}
    else:
        moves = {path: aside / path.name for path in which}
    for source, target in moves.items():
        target.parent.mkdir(exist_ok=True)
        source.rename(target)
    return moves


def put_newer_aside(run_folder: Path, found: Path) -> list[Path]:
    """Move the checkpoints that were passed over for `found` aside; where they are.

    They are damaged: in place they would count as checkpoints to keep, and be exported.
    """
    own = checkpoints(run_folder)
    newer = own[own.index(found) + 1 :] if found in own else []
    return list(archive(run_folder, newer).values())


def check_compatible(folder: Path, run: Manifest, steps: int) -> Manifest:
    """The manifest of `folder`, if this run can go on from it.

    Args:
        run: what this run is: the checkpoint must have its recipe, and the layout that wrote it
            unless its state is by parameter name.
        steps: of the whole run.

    Raises:
        CheckpointError: it was written by another layout, from other data or another network, or
            is further on.
    """
    recipe = run.recipe
    manifest = read_manifest(folder)
    if manifest.layout != run.layout and not manifest.by_name:
        raise CheckpointError(
            f"was written with {manifest.layout}; this run has {run.layout}",
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
    if changed := _changed(manifest.recipe.settings, recipe.settings):
        raise CheckpointError(
            f"belongs to another order of samples: {'; '.join(changed)}",
            where=str(folder),
            fix="resume with the same values; to train its result on other data, start a new run "
            "with model.path=<that run>/export; or begin this one again with train.resume=never",
        )
    before = manifest.recipe.model
    if changed := _changed_config(before, recipe.model) if before else []:
        raise CheckpointError(
            f"is of another network: config.json of the model changed: {'; '.join(changed)}",
            where=str(folder),
            fix="give the model folder that was trained (model.path), with its config.json as it "
            "was; to train another network, start a new run or set train.resume=never",
        )
    digests = [each.lineage.get("base_digest") for each in (manifest, run)]
    if all(digests) and digests[0] != digests[1]:
        raise CheckpointError(
            f"holds what was trained beside another base model: its weights changed (digest "
            f"{digests[0]}, and {digests[1]} now)",
            where=str(folder),
            fix="put the model folder back as it was (model.path), or use train.resume=never",
        )
    references = [each.lineage.get("reference_digest") for each in (manifest, run)]
    if all(references) and references[0] != references[1]:
        raise CheckpointError(
            f"was trained against another reference model (digest {references[0]}, and "
            f"{references[1]} now)",
            where=str(folder),
            fix="put objective.reference, objective.reference_model and tuning.init_from back as "
            "they were, and their folders; or use train.resume=never",
        )
    if manifest.step > steps:
        raise CheckpointError(
            f"is at step {manifest.step}, and this run has {steps} steps",
            where=str(folder),
            fix=f"set train.steps above {manifest.step}, or train.resume=never",
        )
    return manifest


def changed_settings(before: Manifest, run: Manifest) -> list[str]:
    """What of a run's settings is another than in the checkpoint that it goes on from."""
    layouts = [
        {key: str(value) for key, value in asdict(each.layout).items()} for each in (before, run)
    ]
    return _changed(*layouts) + _changed(before.settings, run.settings)


def _changed(before: dict[str, str], now: dict[str, str]) -> list[str]:
    return [
        f"{key} was {before.get(key)}, now {value}"
        for key, value in now.items()
        if before.get(key) != value
    ]


def _changed_config(before: Any, now: Any, key: str = "") -> list[str]:
    """`key: old -> new` of every value that differs, with the keys of nested objects."""
    if not (isinstance(before, dict) and isinstance(now, dict)):
        old, new = ("nothing" if v is _MISSING else json.dumps(v) for v in (before, now))
        return [] if before == now else [f"{key}: {old} -> {new}"]
    return [
        change
        for name in sorted(before.keys() | now.keys())
        for change in _changed_config(
            before.get(name, _MISSING), now.get(name, _MISSING), f"{key}.{name}" if key else name
        )
    ]
