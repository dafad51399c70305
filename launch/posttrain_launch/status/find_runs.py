"""The runs that words of a command line mean: run folders, folders of runs, names, jobs."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from posttrain_dist.errors import ClusterError, PosttrainError
from posttrain_launch.batch.queue import JOB_ID, read_command
from posttrain_launch.run.job_record import FILE, JobRecord, read_job

CONFIG = "config.yaml"
DEPTH = 5  # folders below the root: <name>/sweeps/<time>/trial-000
MANY = 6  # of the names in an error


@dataclass(frozen=True, slots=True)
class Found:
    """A run, or a job whose run folder is not known."""

    folder: Path | None
    name: str  # as it is shown and typed
    job: JobRecord | None


def find_runs(words: Sequence[str], root: Path) -> list[Found]:
    """The runs that are meant; without words, those that have a job or are not finished.

    Args:
        words: each a run folder, a folder that holds runs, either of them relative to `root`, or
            the id of a job (of an array: also of one task, "12_3").
        root: where runs are, `output_root`.

    Raises:
        PosttrainError: one of the words is none of these.
        ClusterError: only Slurm could know the job, and does not answer.
    """
    root = root.absolute()
    if not words:
        return [_run(folder, root) for folder in run_folders(root) if _is_of_interest(folder)]
    found = {}
    for word in words:
        for run in _meant_by(word, root):
            found[run.folder or Path(run.name)] = run
    return list(found.values())


def run_folders(root: Path) -> Iterator[Path]:
    """Every run folder below `root`, by name; folders that may not be read are passed over."""
    yield from _walk(root, DEPTH)


def _walk(folder: Path, depth: int) -> Iterator[Path]:
    try:
        entries = {entry.name: entry for entry in os.scandir(folder)}
    except OSError:
        return
    if CONFIG in entries or FILE in entries:  # the second alone: its run folder is elsewhere
        yield folder
        return
    inside = sorted(entry.path for entry in entries.values() if _is_folder(entry))
    for path in inside if depth else ():
        yield from _walk(Path(path), depth - 1)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    return entry.is_dir(follow_symlinks=False) and not entry.name.startswith(".")


def _is_of_interest(folder: Path) -> bool:
    try:
        if (folder / FILE).is_file():
            return True
        begun = any((folder / name).exists() for name in ("logs/driver.lock", "metrics.jsonl"))
        return begun and not (folder / "FINISHED").is_file()  # not what a dry run has left
    except PermissionError:
        return True


def _meant_by(word: str, root: Path) -> list[Found]:
    for folder in (Path(word), root / word):
        inside = [_run(run, root) for run in run_folders(folder.absolute())]
        if inside:
            return inside
    known = list(run_folders(root))
    jobs = [(folder, job) for folder in known if (job := _job(folder)) is not None]
    driven = [_run(folder, root) for folder, job in jobs if _is_of(job, word)]
    if driven:
        return driven
    if JOB_ID.fullmatch(word):
        return _job_of_slurm(word, root)
    raise _unknown(word, root, known, [job.id for _, job in jobs])


def _job_of_slurm(job_id: str, root: Path) -> list[Found]:
    """A job that no run below `root` knows: its script stands in its run folder, or sweep."""
    try:
        script, why = read_command(job_id), "Slurm does not know it (any more)"
    except ClusterError as error:
        script, why = None, error.what
    if script is None:
        raise PosttrainError(
            f"is the job of no run below {root}, and {why}",
            where=job_id,
            fix="give the run folder, or --root=<output_root of the run>",
        )
    if not os.access(script.parent, os.R_OK | os.X_OK):  # of another user; the job is still one
        return [Found(None, job_id, JobRecord("slurm", job_id, ""))]
    near = [_run(folder, root) for folder in _walk(script.parent, 1)]
    driven = [run for run in near if run.job is not None and _is_of(run.job, job_id)]
    # A run that was submitted again has a newer job in its job.json.
    if driven or [run.folder for run in near] == [script.parent]:
        return driven or near
    raise PosttrainError(
        f"is no job of a posttrain run; it runs {script}",
        where=job_id,
        fix=f"`scontrol show job {job_id}` says more about it",
    )


def _is_of(job: JobRecord, word: str) -> bool:
    """Whether a word means a job: its id, or that of its array."""
    return word in (job.id, job.id.split("_")[0])


def _run(folder: Path, root: Path) -> Found:
    name = str(folder.relative_to(root)) if folder.is_relative_to(root) else str(folder)
    return Found(folder, name if name != "." else str(folder), _job(folder))


def _job(folder: Path) -> JobRecord | None:
    try:
        return read_job(folder)
    except (PosttrainError, ValueError, OSError):
        return None  # torn, or closed to us; what else the folder says is still shown


def _unknown(word: str, root: Path, known: list[Path], jobs: list[str]) -> PosttrainError:
    names = [str(folder.relative_to(root)) for folder in known if folder.is_relative_to(root)]
    near = difflib.get_close_matches(word, [*names, *jobs], n=MANY, cutoff=0.5)
    near = near or [name for name in names if word in name][:MANY] or names[-MANY:]
    if not root.is_dir():
        fix = f"there is no folder {root}: give --root=<output_root of the runs>"
    elif not near:
        fix = f"there is no run below {root}: give --root=<output_root of the runs>"
    else:
        fix = f"below {root} there are: {', '.join(near)}"
    return PosttrainError("is no run folder and no job", where=word, fix=fix)
