"""job.json of a run folder: which job of a cluster drives the run. Written by `submit`."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Literal

from posttrain_dist.errors import PosttrainError
from posttrain_dist.files import read_object, write_atomic

FILE = "job.json"


@dataclass(frozen=True, slots=True)
class JobRecord:
    """The newest job of a run; a run that is submitted again has a new one."""

    system: Literal["slurm", "ray"]
    id: str  # of Slurm, "1234" or "1234_5" (a task of an array); of Ray's job API
    submitted: str  # ISO time with its offset
    address: str | None = None  # of Ray's job API, "http://host:8265"


def write_job(run_folder: Path, record: JobRecord) -> None:
    """Keep the job of a run."""
    write_atomic(run_folder / FILE, json.dumps(asdict(record), indent=1) + "\n", to_disk=True)


def new_record(
    system: Literal["slurm", "ray"], job_id: str, address: str | None = None
) -> JobRecord:
    """The record of a job that was submitted just now."""
    return JobRecord(
        system, job_id, datetime.now().astimezone().isoformat(timespec="seconds"), address
    )


def read_job(run_folder: Path) -> JobRecord | None:
    """The newest job of a run; None: it was started by hand.

    Raises:
        PosttrainError: the file is there and holds something else.
    """
    path = run_folder / FILE
    if not path.is_file():
        return None
    values = read_object(path)
    try:
        return JobRecord(**values)
    except TypeError as error:
        raise PosttrainError(
            f"holds no job: {error}", where=str(path), fix="remove the file; the run is not touched"
        ) from error
