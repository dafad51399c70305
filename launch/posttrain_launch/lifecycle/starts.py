"""logs/starts.jsonl of a run folder: its starts, and how each ended.

{"start": 2, "job": "71", "restart_count": 1, "nodes": ["node1"], "began": time, "step": 40}
{"start": 2, "ended": time, "step": 60, "code": 85, "cause": "time_limit", "action": "requeue",
 "reason": "the time limit was near"}

A start whose second line is missing was killed, with its machine perhaps. Of several second lines
the last one counts: the job script may know better than the driver why it ended.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from posttrain_dist.checkpoint.manifest import newest_step
from posttrain_dist.config import RunConfig, Slurm
from posttrain_launch.lifecycle.decide import (
    Cause,
    Decision,
    Policy,
    Start,
    next_action,
)
from posttrain_launch.lifecycle.exit_codes import Exit

FILE = Path("logs", "starts.jsonl")


@dataclass(frozen=True, slots=True)
class Job:
    """What a scheduler says of the job that a process runs in."""

    id: str | None  # of Slurm, "71" or "71_2" (a task of an array); None: started by hand
    restart_count: int
    nodes: list[str]


def this_job(environment: Mapping[str, str] = os.environ) -> Job:
    """The job of this process, from its environment."""
    job = environment.get("SLURM_JOB_ID")
    if array := environment.get("SLURM_ARRAY_JOB_ID"):
        job = f"{array}_{environment.get('SLURM_ARRAY_TASK_ID', '0')}"
    nodes = environment.get("POSTTRAIN_NODES", "").split() or [platform.node()]
    return Job(job, int(environment.get("SLURM_RESTART_COUNT") or 0), nodes)


def policy_of(config: RunConfig) -> Policy:
    """What a run is allowed, by its configuration."""
    return Policy(requeue=not isinstance(config.cluster, Slurm) or config.cluster.requeue)


def begin(run_folder: Path, job: Job, runs: int = 1) -> int:
    """Write the first line of a start; its number, from 1.

    Args:
        runs: that its processes train together; they share what these cost.
    """
    number = max((row["start"] for row in read(run_folder)), default=0) + 1
    _append(
        run_folder,
        {
            "start": number,
            "job": job.id,
            "restart_count": job.restart_count,
            "nodes": job.nodes,
            "began": _now(),
            "step": newest_step(run_folder),
            **({"runs": runs} if runs > 1 else {}),
        },
    )
    return number


def close(
    run_folder: Path, number: int, code: int, cause: Cause, policy: Policy | None = None
) -> Decision:
    """Write the second line of a start, and what follows from it.

    Args:
        code: exit code of the driver.
    """
    row = {row["start"]: row for row in read(run_folder)}.get(number, {"before": 0, "job": None})
    step = newest_step(run_folder)
    earlier = history(run_folder, row["job"], before=number)
    decision = next_action([*earlier, Start(row["before"], step, code, cause)], policy)
    _append(
        run_folder,
        {
            "start": number,
            "ended": _now(),
            "step": step,
            "code": code,
            "cause": str(cause),
            "action": str(decision.action),
            "reason": decision.reason,
        },
    )
    return decision


def read(run_folder: Path) -> list[dict[str, Any]]:
    """Every start, oldest first, its lines as one object; `before` is the step that it began at."""
    found: dict[int, dict[str, Any]] = {}
    with contextlib.suppress(OSError):
        for line in (run_folder / FILE).read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(ValueError, KeyError, TypeError):
                row = json.loads(line)  # a line that a kill tore is none
                if "began" in row:
                    found[row["start"]] = {**row, "before": int(row["step"])}
                else:
                    found[row["start"]].update(row)
    return [found[number] for number in sorted(found)]


def history(run_folder: Path, job_id: str | None, before: int | None = None) -> list[Start]:
    """The starts of one job, as `decide.next_action` takes them.

    One that left no word ended at the step that the next one began at, or that is newest now.

    Args:
        before: only starts with a lower number; None: all.
    """
    rows = read(run_folder)
    ends = [*(row["before"] for row in rows[1:]), newest_step(run_folder)]
    return [
        Start(row["before"], int(row["step"]), int(row["code"]), _cause(row["cause"]))
        if "ended" in row
        else Start(row["before"], after, int(Exit.requeue), Cause.killed)
        for row, after in zip(rows, ends, strict=True)
        if row["job"] == job_id and (before is None or row["start"] < before)
    ]


def _cause(text: str) -> Cause:
    try:
        return Cause(text)
    except ValueError:  # of another version
        return Cause.killed


def _append(run_folder: Path, row: dict[str, Any]) -> None:
    # A full disk does not end a run by this file.
    with contextlib.suppress(OSError), (run_folder / FILE).open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(row) + "\n")


def _now() -> str:
    return datetime.now().astimezone().isoformat(timespec="seconds")
