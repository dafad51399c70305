"""The logs of a run, the one that says most first.

That is the log of the rank that failed (logs/error.json names it), else that of the first rank
with a traceback, else rank 0's; then the driver's last lines, then Slurm's.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from posttrain_dist.errors import PosttrainError
from posttrain_launch.status.run_facts import read_json, tail_text

TRACEBACK = "Traceback (most recent call last)"
_NUMBERED = re.compile(r"rank-(\d+)\.log")


@dataclass(frozen=True, slots=True)
class Part:
    """One log that is shown."""

    path: Path
    why: str  # of its heading


def log_parts(folder: Path, rank: int | None = None, job: str | None = None) -> list[Part]:
    """The logs that are shown of a run, in their order.

    Args:
        rank: only the log of this one.
        job: id of its Slurm job.

    Raises:
        PosttrainError: there is no such log; the error says where to look instead.
    """
    ranks = rank_logs(folder)
    if rank is not None:
        if rank in ranks:
            return [Part(ranks[rank], f"rank {rank}")]
        raise _no_such_rank(folder, rank, ranks)
    parts = [first] if (first := _first_rank(folder, ranks)) is not None else []
    driver = folder / "logs" / "driver.log"
    parts += [Part(driver, "driver")] if driver.is_file() else []
    if (slurm := _slurm_log(folder, job)) is not None:
        parts.append(Part(slurm, "Slurm job"))
    if not parts:
        raise PosttrainError(
            "has no logs yet",
            where=str(folder),
            fix=f"`posttrain status {folder}` says whether it was started",
        )
    return parts


def rank_logs(folder: Path) -> dict[int, Path]:
    """The logs of the ranks, by rank."""
    found = {
        int(match.group(1)): path
        for path in (folder / "logs").glob("rank-*.log")
        if (match := _NUMBERED.fullmatch(path.name))
    }
    return dict(sorted(found.items()))


def _first_rank(folder: Path, ranks: dict[int, Path]) -> Part | None:
    if not ranks:
        return None
    failed = read_json(folder / "logs" / "error.json").get("rank")
    if failed in ranks:
        return Part(ranks[failed], f"rank {failed}, which failed first")
    if not (folder / "FINISHED").is_file():
        torn = [rank for rank, path in ranks.items() if TRACEBACK in tail_text(path)]
        if torn:  # a rank whose neighbour is gone fails later than that one
            first = min(torn, key=lambda rank: ranks[rank].stat().st_mtime)
            return Part(ranks[first], f"rank {first}, which failed first")
    first = next(iter(ranks))
    return Part(ranks[first], f"rank {first}")


def _slurm_log(folder: Path, job: str | None) -> Path | None:
    """The log of its job, else the newest one."""
    logs = sorted((folder / "logs").glob("slurm-*.log"), key=lambda path: path.stat().st_mtime)
    named = [path for path in logs if job is not None and path.name == f"slurm-{job}.log"]
    found = named or logs
    return found[-1] if found else None


def _no_such_rank(folder: Path, rank: int, ranks: dict[int, Path]) -> PosttrainError:
    what = "has no log of a rank yet"
    fix = f"without --rank, `posttrain logs {folder}` shows what the driver and Slurm say"
    if ranks:
        what = f"has no log of rank {rank}"
        fix = f"its ranks are {min(ranks)} to {max(ranks)}"
    return PosttrainError(what, where=str(folder / "logs"), fix=fix)


def last_lines(path: Path, count: int) -> list[str]:
    """The last lines of a log, without the states of progress bars that were overwritten.

    Raises:
        PosttrainError: it may not be read.
    """
    try:
        path.open("rb").close()
    except PermissionError as error:
        raise PosttrainError(
            "may not be read by you", where=str(path), fix="ask the run's owner"
        ) from error
    except OSError:
        return []
    text = tail_text(path, max(65_536, 400 * count))
    lines = [line.rpartition("\r")[2] if "\r" in line else line for line in _lines(text)]
    return lines[-count:]


def _lines(text: str) -> list[str]:
    return [line.rstrip("\r") for line in text.rstrip("\n").split("\n")] if text else []
