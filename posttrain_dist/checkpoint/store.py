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
from posttrain_dist.checkpoint.manifest import (
    MANIFEST,
    Manifest,
    fault_of,
    is_step_name,
    is_whole,
    read_manifest,
    step_name,
)
from posttrain_dist.checkpoint.trained_state import step_of_tensors
from posttrain_dist.errors import CheckpointError, is_out_of_memory, reason
from posttrain_dist.files import FileDigest, commit_folder, digest_of, partial_of, write_atomic

STATE = "state"  # folder of the engine's files inside a checkpoint
TENSORS = ".safetensors"
OPENED = (".pt", TENSORS)  # of these files every one is opened before a load

WriteState = Callable[[Path], Mapping[str, FileDigest]]
# Opens a file of the engine as it will be opened for loading; the updates that its state has had,
# where the file says so.
OpenFile = Callable[[Path], int | None]


def folder_of(run_folder: Path, step: int) -> Path:
    """Where the checkpoint of `step` is."""
    return run_folder / "checkpoints" / step_name(step)


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
        if dist.is_connection_error(error) or is_out_of_memory(error):
            raise  # no fault of the disk
        file = f": {error.filename}" if isinstance(error, OSError) and error.filename else ""
        raise CheckpointError(
            f"step {manifest.step} cannot be written: {reason(error)}{file}",
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
    """Every checkpoint of a run that is whole by names and sizes, oldest first."""
    return [path for path in checkpoints(run_folder) if is_whole(path)]


def checkpoints(run_folder: Path) -> list[Path]:
    """Folders that are named as checkpoints, whole or not, oldest first."""
    found = (run_folder / "checkpoints").glob("step-*")
    return sorted((path for path in found if is_step_name(path.name)), key=_step_of)


def _step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def damage_of(folder: Path, open_file: OpenFile) -> str:
    """What of a checkpoint is not as it was written; "": nothing. Collective.

    Called before a checkpoint is loaded, so that no rank has loaded a part of it when another finds
    it damaged: each rank compares a share of the files with their digests, then opens them.

    Returns:
        The same on all ranks.

    Raises:
        CheckpointError: another version wrote it.
    """
    shares = dist.gather(dist.on_all(lambda: _damage_of_share(folder, open_file)))
    return dist.from_main(lambda: next(filter(None, shares), ""))


def _open(path: Path, open_file: OpenFile) -> int | None:
    if path.suffix not in OPENED:
        return None
    return step_of_tensors(path) if path.suffix == TENSORS else open_file(path)


def _damage_of_share(folder: Path, open_file: OpenFile) -> str:
    if fault := fault_of(folder):
        return fault
    manifest = read_manifest(folder)
    files = manifest.files
    for path in sorted((folder / STATE).rglob("*")):  # which a library may find by its pattern
        if path.suffix in OPENED and path.relative_to(folder).as_posix() not in files:
            return f"{path.relative_to(folder)} is not in {MANIFEST}"
    largest_first = sorted(files, key=lambda name: (-files[name].bytes, name))
    for name in largest_first[dist.rank() :: dist.world()]:
        try:
            if digest_of(folder / name) != files[name]:
                return f"{name} is damaged: its content has changed since it was written"
            step = _open(folder / name, open_file)
        except OSError as error:
            return f"{name} cannot be read: {error.strerror}"
        except CheckpointError as error:
            return f"{name} {error.what}"
        if step is not None and step != manifest.step:
            return f"{name} is of step {step}, and {MANIFEST} of step {manifest.step}"
    return ""
