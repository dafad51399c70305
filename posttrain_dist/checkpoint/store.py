"""Write, find and prune checkpoints.

A checkpoint is written to `step-000100.partial/`; its manifest comes last, the folder is then
renamed, and `latest` moves after that. What has no whole manifest is no checkpoint: neither a
marker of DeepSpeed nor one of Ray decides what is good.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from posttrain_dist import dist
from posttrain_dist.errors import CheckpointError
from posttrain_dist.files import sync, write_whole

MANIFEST = "MANIFEST.json"
FORMAT = 2


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a checkpoint is, written after everything else in it."""

    step: int
    layout: dict[str, Any]  # engine, workers, dtype: what may read the state again
    channels: list[str]
    recipe: dict[str, str] = field(default_factory=dict)  # config key -> value; must not change
    lineage: dict[str, Any] = field(default_factory=dict)  # hashes, W&B id
    files: dict[str, int] = field(default_factory=dict)  # path below the folder -> bytes
    format: int = FORMAT


def folder_of(run_folder: Path, step: int) -> Path:
    """Where the checkpoint of `step` is."""
    return run_folder / "checkpoints" / f"step-{step:06d}"


def save(
    run_folder: Path,
    manifest: Manifest,
    write_state: Callable[[Path], None],
    *,
    keep: int,
    best: int | None = None,
) -> Path:
    """Write one checkpoint; collective.

    Args:
        write_state: writes this rank's share below the folder it is given.
        keep: newest checkpoints that stay; 0: all.
        best: step with the lowest held-out loss: the checkpoint at or before it stays too.

    Raises:
        CheckpointError: the disk refused; the run goes no further, older checkpoints are whole.
    """
    final = folder_of(run_folder, manifest.step)
    partial = final.with_name(final.name + ".partial")

    def make_room() -> None:
        shutil.rmtree(partial, ignore_errors=True)
        (partial / "state").mkdir(parents=True)

    def commit() -> None:
        _commit(partial, final, manifest)
        _prune(run_folder, keep, final, best)

    try:
        dist.on_main(make_room)
        dist.on_all(lambda: write_state(partial / "state"))
        dist.on_main(commit)
    except (OSError, RuntimeError) as error:  # torch says RuntimeError where a disk is full
        raise CheckpointError(
            f"step {manifest.step} cannot be written: {error}",
            where=str(partial),
            fix="free space or set output_root to another disk; `posttrain run` goes on from the "
            "last whole checkpoint",
        ) from error
    return final


def _commit(partial: Path, final: Path, manifest: Manifest) -> None:
    sizes = {}
    for path in sorted(p for p in partial.rglob("*") if p.is_file()):
        sync(path)
        sizes[str(path.relative_to(partial))] = path.stat().st_size
    text = json.dumps({**asdict(manifest), "files": sizes}, indent=1)
    write_whole(partial / MANIFEST, text, to_disk=True)
    sync(partial)
    if final.exists():  # of an earlier try: train.resume=never, or torn
        shutil.rmtree(final)
    partial.replace(final)
    sync(final.parent)
    write_whole(final.parent / "latest", final.name + "\n")


def _prune(run_folder: Path, keep: int, newest: Path, best: int | None) -> None:
    if keep <= 0:
        return
    others = [path for path in whole_checkpoints(run_folder) if path != newest]
    good = [path for path in [*others, newest] if best is not None and _step_of(path) <= best]
    for old in others[: max(0, len(others) + 1 - keep)]:
        if old not in good[-1:]:
            shutil.rmtree(old, ignore_errors=True)  # what stays costs space, not the run


def is_whole(folder: Path) -> bool:
    """Whether `folder` holds a manifest and every file that it names, in its size."""
    try:
        files = json.loads((folder / MANIFEST).read_text())["files"]
        return all((folder / name).stat().st_size == size for name, size in files.items())
    except (OSError, ValueError, KeyError):
        return False


def whole_checkpoints(run_folder: Path) -> list[Path]:
    """Every whole checkpoint of a run, oldest first."""
    found = (run_folder / "checkpoints").glob("step-*[0-9]")
    return sorted((path for path in found if is_whole(path)), key=_step_of)


def _step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


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
    values = json.loads((folder / MANIFEST).read_text())
    if values.get("format") != FORMAT:
        raise CheckpointError(
            f"has format {values.get('format')}, this version reads {FORMAT}",
            where=str(folder),
            fix="use the version that wrote it",
        )
    return Manifest(**values)
