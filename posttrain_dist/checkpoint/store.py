"""Write, find, verify and prune checkpoints.

A checkpoint is written to `step-000100.partial/`; its manifest comes last, the folder is then
renamed, and `latest` moves after that. What has no whole manifest is no checkpoint: neither a
marker of DeepSpeed nor one of Ray decides what is good.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from posttrain_dist import dist
from posttrain_dist.checkpoint.manifest import MANIFEST, Manifest, is_whole, read_manifest
from posttrain_dist.errors import CheckpointError, reason
from posttrain_dist.files import FileDigest, commit_folder, digest_of, partial_of, write_atomic

STATE = "state"  # folder of the engine's files inside a checkpoint

WriteState = Callable[[Path], Mapping[str, FileDigest]]


def folder_of(run_folder: Path, step: int) -> Path:
    """Where the checkpoint of `step` is."""
    return run_folder / "checkpoints" / f"step-{step:06d}"


def save(
    run_folder: Path,
    manifest: Manifest,
    write_state: WriteState,
    *,
    keep: int,
    best: int | None = None,
) -> Path:
    """Write one checkpoint; collective.

    Args:
        write_state: writes this rank's share below the folder it is given, and returns the digests
            that it made of its files meanwhile, by their paths below that folder.
        keep: newest checkpoints that stay; 0: all.
        best: step with the lowest held-out loss: the checkpoint at or before it stays too.

    Raises:
        CheckpointError: the disk refused; the run goes no further, older checkpoints are whole.
    """
    final = folder_of(run_folder, manifest.step)
    partial = partial_of(final)

    def make_room() -> None:
        shutil.rmtree(partial, ignore_errors=True)
        (partial / STATE).mkdir(parents=True)

    def commit() -> None:
        files = _digests(partial, shares)
        write_atomic(partial / MANIFEST, replace(manifest, files=files).to_json())
        commit_folder(partial, final, replace=True)  # one of an earlier try: never, or torn
        write_atomic(final.parent / "latest", final.name + "\n")
        _prune(run_folder, keep, final, best)

    try:
        dist.on_main(make_room)
        shares = dist.gather(dist.on_all(lambda: write_state(partial / STATE)))
        dist.on_main(commit)
    except (OSError, RuntimeError) as error:  # torch says RuntimeError where a disk is full
        if dist.is_connection_error(error):
            raise  # no fault of the disk: the worker is replaced and the run goes on
        file = f": {error.filename}" if isinstance(error, OSError) and error.filename else ""
        told = reason(error) + file
        raise CheckpointError(
            f"step {manifest.step} cannot be written: {told}",
            where=str(partial),
            fix="free space or set output_root to another disk; `posttrain run` goes on from the "
            "last whole checkpoint",
        ) from error
    return final


def _digests(partial: Path, shares: list[Mapping[str, FileDigest]]) -> dict[str, FileDigest]:
    """Every file that was written; those that no rank made a digest of are read back here.

    Raises:
        OSError: a file is missing here, or has another size than its rank wrote.
    """
    known = {f"{STATE}/{name}": digest for share in shares for name, digest in share.items()}
    for name, digest in known.items():
        size = (partial / name).stat().st_size
        if size != digest.bytes:
            raise OSError(f"{name} has {size} bytes on the disk, {digest.bytes} were written")
    paths = sorted(path for path in partial.rglob("*") if path.is_file())
    names = {path.relative_to(partial).as_posix(): path for path in paths}
    return {name: known.get(name) or digest_of(path) for name, path in names.items()}


def _prune(run_folder: Path, keep: int, newest: Path, best: int | None) -> None:
    if keep <= 0:
        return
    others = [path for path in whole_checkpoints(run_folder) if path != newest]
    good = [path for path in [*others, newest] if best is not None and _step_of(path) <= best]
    for old in others[: max(0, len(others) + 1 - keep)]:
        if old not in good[-1:]:
            shutil.rmtree(old, ignore_errors=True)  # what stays costs space, not the run


def whole_checkpoints(run_folder: Path) -> list[Path]:
    """Every whole checkpoint of a run, oldest first."""
    return [path for path in _checkpoints(run_folder) if is_whole(path)]


def damaged_since(run_folder: Path, whole: Path | None) -> list[Path]:
    """Checkpoints newer than `whole` that are not whole, oldest first: they are passed over."""
    least = _step_of(whole) if whole is not None else -1
    return [path for path in _checkpoints(run_folder) if _step_of(path) > least]


def _checkpoints(run_folder: Path) -> list[Path]:
    """Folders that are named as checkpoints, whole or not, oldest first."""
    found = (run_folder / "checkpoints").glob("step-*")
    return sorted((p for p in found if p.name.removeprefix("step-").isdigit()), key=_step_of)


def _step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def verify(folder: Path) -> None:
    """Compare the content of every file with its digest; collective, each rank reads a share.

    Called once before a checkpoint is loaded: what a disk or a copy damaged without changing a
    size would otherwise be trained on.

    Raises:
        CheckpointError: a file is damaged, or the checkpoint is not whole.
    """
    files = read_manifest(folder).files
    largest_first = sorted(files, key=lambda name: (-files[name].bytes, name))
    own = largest_first[dist.rank() :: dist.world()]
    dist.on_all(lambda: _verify_files(folder, {name: files[name] for name in own}))


def _verify_files(folder: Path, files: Mapping[str, FileDigest]) -> None:
    for name, written in files.items():
        try:
            fault = "" if digest_of(folder / name) == written else "its content has changed since"
        except OSError as error:
            fault = f"it cannot be read: {error.strerror}"
        if fault:
            raise CheckpointError(
                f"{name} is damaged: {fault}", where=str(folder), fix=_way_around(folder)
            )


def _way_around(folder: Path) -> str:
    whole = [path for path in whole_checkpoints(folder.parent.parent) if path.name != folder.name]
    before = [path for path in whole if _step_of(path) < _step_of(folder)]
    away = f"mv {folder} {folder}.damaged"
    if before:
        return f"{away}; the run then goes on from {before[-1].name}, the whole one before it"
    return f"{away}; there is no whole one before it, so the run then starts again"
