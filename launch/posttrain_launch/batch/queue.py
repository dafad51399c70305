"""What Slurm says of jobs: one squeue for all of them, sacct for those that have left the queue.

Every question has a deadline: a controller that is down keeps squeue waiting for a minute and more.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from posttrain_dist.errors import ClusterError

DEADLINE_S = 10.0
SEPARATOR = "|"
# Widths, or squeue cuts at 20 characters; `-O` alone knows how often a job was restarted.
FIELDS = (
    ("JobArrayID", 40),
    ("State", 20),
    ("Reason", 250),
    ("TimeLeft", 20),
    ("RestartCnt", 12),
    ("NodeList", 500),
)
JOB_ID = re.compile(r"\d+(_\d+)?")
WAITING = frozenset({"PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT"})
ON_NODES = frozenset({"RUNNING", "COMPLETING", "CONFIGURING", "STAGE_OUT", "SIGNALING", "RESIZING"})
PAUSED = frozenset({"SUSPENDED", "STOPPED", "RESV_DEL_HOLD"})
_UNITS_S = (1, 60, 3600)


@dataclass(frozen=True, slots=True)
class QueuedJob:
    """A job as the queue has it."""

    id: str  # "1234", or "1234_5" of an array
    state: str  # in Slurm's words: PENDING, RUNNING, TIMEOUT …
    reason: str = ""  # why it waits or ended; empty where Slurm has none
    time_left_s: float | None = None  # to its time limit
    restarts: int = 0
    nodes: str = ""  # in Slurm's form, "node[1-4]"

    @property
    def is_live(self) -> bool:
        """Whether it waits, runs or is paused: it may still do something to its run."""
        return self.state in WAITING | ON_NODES | PAUSED


def read_queue(ids: Sequence[str]) -> dict[str, QueuedJob]:
    """Jobs by id, in one call; of those that have left the queue, what the accounting has.

    Args:
        ids: of jobs, or of tasks of an array; one that Slurm does not know any more is left out.

    Raises:
        ClusterError: there is no squeue here, or the controller does not answer.
    """
    if not ids:
        return {}
    form = ",".join(f"{name}:{width}{SEPARATOR}" for name, width in FIELDS)
    done = ask("squeue", "-h", "-r", "-t", "all", "-j", ",".join(ids), "-O", form)
    if done.returncode != 0 and "Invalid job id" not in done.stderr:
        raise _unreachable("squeue", done.stderr)
    found = {job.id: job for job in map(_job_of_line, done.stdout.splitlines()) if job is not None}
    return _ended(sorted(set(ids) - found.keys())) | found


def _job_of_line(line: str) -> QueuedJob | None:
    cells = [cell.strip() for cell in line.split(SEPARATOR)]
    if len(cells) < len(FIELDS) or not JOB_ID.fullmatch(cells[0]):
        return None
    job_id, state, reason, left, restarts, nodes = cells[: len(FIELDS)]
    count = int(restarts) if restarts.isdigit() else 0
    return QueuedJob(job_id, state, _reason(reason), seconds(left), count, nodes)


def _ended(ids: Sequence[str]) -> dict[str, QueuedJob]:
    """Jobs of the accounting; none where there is none, for which a run folder has its own word."""
    if not ids or shutil.which("sacct") is None:
        return {}
    try:
        done = ask("sacct", "-X", "-n", "-P", "-j", ",".join(ids), "-o", "JobID,State,NodeList")
    except ClusterError:
        return {}
    found = {}
    for line in done.stdout.splitlines() if done.returncode == 0 else ():
        job_id, state, nodes = [*line.split(SEPARATOR), "", ""][:3]
        if JOB_ID.fullmatch(job_id) and state:  # "CANCELLED by 1000"
            found[job_id] = QueuedJob(job_id, state.split()[0], nodes=nodes)
    return found


def read_command(job_id: str) -> Path | None:
    """The script of a job that Slurm still knows; None where it does not.

    Raises:
        ClusterError: there is no scontrol here, or the controller does not answer.
    """
    done = ask("scontrol", "show", "job", "-o", job_id)
    if done.returncode != 0:
        if "Invalid job id" in done.stderr:
            return None
        raise _unreachable("scontrol", done.stderr)
    found = re.search(r" Command=(.*?) WorkDir=", done.stdout)
    return Path(found.group(1)) if found else None


def cancel_job(job_id: str) -> None:
    """Have Slurm end a job: TERM to all of it, KILL after the cluster's KillWait.

    Raises:
        ClusterError: it is not ours, or the controller does not answer.
    """
    done = ask("scancel", job_id)
    answer = _last_line(done.stderr)
    if "denied" in answer:
        raise ClusterError(
            f"Slurm refuses to end job {job_id}: {answer}",
            where="scancel",
            fix="ask its owner, whom `squeue --job` names, or an operator of the cluster",
        )
    if done.returncode != 0 and "Invalid job id" not in answer and "already" not in answer:
        raise _unreachable("scancel", done.stderr)


def ask(program: str, *words: str) -> subprocess.CompletedProcess[str]:
    """Run a program of Slurm, for at most DEADLINE_S.

    Raises:
        ClusterError: it is not here, or took longer.
    """
    path = shutil.which(program)
    if path is None:
        raise ClusterError(
            f"there is no {program} on this machine",
            where="Slurm",
            fix="use a login node of the cluster; what the run folder says is shown all the same",
        )
    try:
        return subprocess.run(
            [path, *words],
            capture_output=True,
            text=True,
            check=False,
            encoding="utf-8",
            errors="replace",
            timeout=DEADLINE_S,
        )
    except subprocess.TimeoutExpired as error:
        raise _unreachable(program, f"no answer within {DEADLINE_S:g} s") from error


def seconds(text: str) -> float | None:
    """Slurm's "1-02:03:04", "02:03:04" or "03:04" in seconds; None of UNLIMITED, N/A and others."""
    days, dash, clock = text.rpartition("-")
    parts = clock.split(":")
    if not all(part.isdigit() for part in parts) or len(parts) > 3 or (dash and not days.isdigit()):
        return None
    units = zip(reversed(parts), _UNITS_S, strict=False)
    return float(int(days or 0) * 86400 + sum(int(part) * unit for part, unit in units))


def _reason(text: str) -> str:
    return "" if text in ("None", "N/A") else text


def _unreachable(program: str, answer: str) -> ClusterError:
    return ClusterError(
        f"Slurm does not answer: {_last_line(answer) or 'no reason given'}",
        where=program,
        fix="`scontrol ping` says whether the controller is up; try again later",
    )


def _last_line(text: str) -> str:
    """What a program of Slurm said last, without its own name before it."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return re.sub(r"^\w+: (error|fatal): ", "", lines[-1]) if lines else ""
