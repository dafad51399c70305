"""The folder of a sweep: all that a sweep is, so that it goes on after its driver was killed.

outputs/<name>/sweeps/<time>/
  sweep.json          what was typed, the keys that vary, the metric, the W&B group; written once
  trials.jsonl        one line a trial, appended before the trial's folder is made: who it is
  trial-000/          the run folder of trial 0, as that of every run; FINISHED is its only success
  trials.txt          the table, rewritten after each trial
  study.journal       of hydra/sweeper=posttrain_optuna
  sweep.html          by `posttrain report <this folder>` and at the end

A trial is never asked how it went by the process that started it: its run folder says so
(`state_of`), whoever looks and whenever.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from posttrain_dist.files import read_object, read_rows
from posttrain_launch.run.job_record import read_job

SWEEP, TRIALS = "sweep.json", "trials.jsonl"
PRUNED = "PRUNED"  # a file in a trial's run folder: stopped by the search, its checkpoint is kept


class State(Enum):
    """Where a trial stands."""

    waiting = "waiting"  # it has no run folder yet, or its job has not begun
    running = "running"
    done = "done"  # FINISHED
    pruned = "pruned"
    stopped = "stopped"  # saved and left; it can go on
    failed = "failed"


@dataclass(frozen=True, slots=True)
class Trial:
    """One trial of a sweep: a run with these overrides, in this folder."""

    number: int
    overrides: tuple[str, ...]  # of this trial, the shared ones included
    folder: Path  # `<sweep>/trial-<number>`
    extra: dict[str, Any] = field(default_factory=dict)  # of the search, such as Optuna's number


def trial_folder(sweep: Path, number: int) -> Path:
    """The run folder of a trial."""
    return sweep / f"trial-{number:03d}"


def read_trials(sweep: Path) -> list[Trial]:
    """Every trial that was begun or is to be, by number."""
    rows = read_rows(sweep / TRIALS)
    found = {
        row["number"]: Trial(
            row["number"],
            tuple(row["overrides"]),
            trial_folder(sweep, row["number"]),
            row.get("extra", {}),
        )
        for row in rows
    }
    return [found[number] for number in sorted(found)]


def is_sweep(folder: Path) -> bool:
    """Whether a folder is that of a sweep."""
    return (folder / SWEEP).is_file()


def read_sweep(folder: Path) -> dict[str, Any]:
    """What sweep.json holds."""
    return read_object(folder / SWEEP)


def has_job(trial: Trial) -> bool:
    """Whether a cluster's job drives the trial."""
    return read_job(trial.folder) is not None


def line_of(trial: Trial) -> str:
    """The line of trials.jsonl."""
    row = {"number": trial.number, "overrides": list(trial.overrides), "extra": trial.extra}
    return json.dumps(row) + "\n"
