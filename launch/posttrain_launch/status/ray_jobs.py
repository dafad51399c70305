"""Jobs of Ray's job API in the words that the states of Slurm's jobs have."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from posttrain_dist.errors import ClusterError
from posttrain_launch.batch.queue import QueuedJob
from posttrain_launch.ray import remote
from posttrain_launch.run.job_record import JobRecord

SENT = "sent.yaml"  # beside job.json: the run folder is on the cluster, and not seen from here
STATES = {
    "pending": "PENDING",
    "running": "RUNNING",
    "finished": "COMPLETED",
    "failed": "FAILED",
    "stopped": "CANCELLED",
    "lost": "NODE_FAIL",
}


def read_ray(records: Sequence[JobRecord]) -> tuple[dict[str, QueuedJob], list[str]]:
    """Jobs by id, and a note for each cluster that does not answer, which is asked once."""
    found: dict[str, QueuedJob] = {}
    silent: dict[str | None, str] = {}
    for record in records:
        if record.address in silent:
            continue
        try:
            found[record.id] = read_ray_job(record)
        except ClusterError as error:
            if "knows no job" not in error.what:
                silent[record.address] = f"{error.what} ({error.where})"
    return found, list(silent.values())


def read_ray_job(record: JobRecord) -> QueuedJob:
    """One job.

    Raises:
        ClusterError: the cluster cannot be reached, or knows no such job.
    """
    seen = remote.state(record)
    reason = seen.reason if seen.state != "running" else ""
    return QueuedJob(record.id, STATES[seen.state], reason)


def is_elsewhere(folder: Path) -> bool:
    """Whether a folder only says which job a run has; the run folder is on the cluster."""
    return (folder / SENT).is_file()
