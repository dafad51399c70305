"""The folder of a sweep: all that a sweep is, so that it goes on after its driver was killed.

outputs/<name>/sweeps/<time>/
  sweep.json          what was typed, the search, where trials run, the metric; written once
  trials.jsonl        one line a trial, on the disk before the trial's folder is made: who it is
  trial-000/          the run folder of trial 0, as that of every run; FINISHED is its only success
  trials.txt          the table, rewritten after each trial
  study.journal       of hydra/sweeper=posttrain_optuna
  sweep.html          by `posttrain report <this folder>` and at the end

How a trial went is not known from the process that started it: its run folder says so
(`sweep/states.py`), whoever looks and whenever.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from posttrain_dist.errors import PosttrainError
from posttrain_dist.files import read_object, sync, write_atomic

SWEEP, TRIALS, LOCK, PAGE = "sweep.json", "trials.jsonl", "sweep.lock", "sweep.html"
PRUNED = "PRUNED"  # a file in a trial's run folder: stopped by the search, its checkpoint is kept


class State(Enum):
    """Where a trial stands."""

    waiting = "waiting"  # it has no run folder yet, or its job has not begun
    running = "running"
    done = "done"  # FINISHED
    pruned = "pruned"
    stopped = "stopped"  # saved and left, or its process was lost; it can go on
    failed = "failed"

    @property
    def is_end(self) -> bool:
        """Whether the sweep has nothing more to do for the trial."""
        return self in (State.done, State.pruned, State.failed)


@dataclass(frozen=True, slots=True)
class Trial:
    """One trial of a sweep: a run with these overrides, in this folder."""

    number: int
    overrides: tuple[str, ...]  # of this trial, the shared ones included
    folder: Path  # `<sweep>/trial-<number>`
    extra: dict[str, Any] = field(default_factory=dict)  # of the search, such as Optuna's number


@dataclass(frozen=True, slots=True, kw_only=True)
class Sweep:
    """What sweep.json holds; nothing of it changes."""

    folder: Path
    name: str  # "<run name>-<time>": of the Slurm array, and the group in W&B
    command: str  # as typed
    created: str  # ISO time with its offset
    cwd: str  # relative paths of the overrides start here
    config_dir: str | None = None  # of the user's YAML
    config_path: str | None = None  # Hydra's --config-path and --config-name
    config_name: str | None = None
    shared: list[str] = field(default_factory=list)  # overrides of one value, of every trial
    force: bool = False  # also start what cannot fit
    metric: str = "eval/loss"  # a key of metrics.jsonl
    direction: str = "minimize"  # or "maximize"
    backend: dict[str, Any] = field(default_factory=dict)  # {"kind": "basic", …its options}
    search: dict[str, Any] = field(default_factory=dict)  # {"kind": "list", …of `plan`}


def write_sweep(sweep: Sweep) -> None:
    """Make the folder, and with sweep.json make it a sweep.

    Raises:
        OSError: the folder is there already, or cannot be written.
    """
    sweep.folder.mkdir(parents=True, exist_ok=False)
    values = {name: value for name, value in asdict(sweep).items() if name != "folder"}
    write_atomic(sweep.folder / SWEEP, json.dumps(values, indent=1) + "\n", to_disk=True)


def read_sweep(folder: Path) -> Sweep:
    """The sweep of a folder.

    Raises:
        PosttrainError: it is no sweep, or sweep.json holds something else.
    """
    folder = folder.absolute()
    if not is_sweep(folder):
        raise PosttrainError(
            f"is no sweep: it has no {SWEEP}",
            where=str(folder),
            fix="give a folder that `posttrain train -m` made: outputs/<name>/sweeps/<time>",
        )
    try:
        return Sweep(folder=folder, **read_object(folder / SWEEP))
    except (TypeError, ValueError) as error:
        raise PosttrainError(
            f"holds no sweep: {error}",
            where=str(folder / SWEEP),
            fix="it is written once and not to be edited: start the sweep again",
        ) from error


def is_sweep(folder: Path) -> bool:
    """Whether a folder is that of a sweep."""
    return (folder / SWEEP).is_file()


# ------------------------------------------------------------------------------------- trials


def trial_folder(sweep: Path, number: int) -> Path:
    """The run folder of a trial."""
    return sweep / f"trial-{number:03d}"


def read_trials(sweep: Path) -> list[Trial]:
    """Every trial that was begun or is to be, by number; a torn last line is none."""
    path = sweep / TRIALS
    rows = _whole_lines(path.read_bytes()) if path.is_file() else b""
    found = {}
    for place, line in enumerate(rows.splitlines(), 1):
        try:
            row = json.loads(line)
            number = row["number"]
            folder = trial_folder(sweep, number)
            found[number] = Trial(number, tuple(row["overrides"]), folder, row["extra"])
        except (ValueError, KeyError, TypeError) as error:
            raise PosttrainError(
                f"is no trial of a sweep: {line[:40].decode(errors='replace')}",
                where=f"{path}:{place}",
                fix="remove the line; run folders trial-… are not touched",
            ) from error
    return [found[number] for number in sorted(found)]


def append_trials(sweep: Path, trials: list[Trial]) -> None:
    """Add trials; on return they outlive a power cut. A torn last line is cut off first."""
    path = sweep / TRIALS
    rows = [
        {"number": trial.number, "overrides": list(trial.overrides), "extra": trial.extra}
        for trial in trials
    ]
    is_new = not path.exists()
    with path.open("ab+") as file:
        file.seek(0)
        file.truncate(len(_whole_lines(file.read())))
        file.write("".join(json.dumps(row) + "\n" for row in rows).encode())
        file.flush()
        os.fsync(file.fileno())
    if is_new:
        sync(sweep)


def _whole_lines(data: bytes) -> bytes:
    return data[: data.rfind(b"\n") + 1]


# ------------------------------------------------------------------------------------ its lock


@contextlib.contextmanager
def driving(folder: Path) -> Iterator[None]:
    """Hold the sweep against a second driver; free as soon as this process has ended, however.

    Raises:
        PosttrainError: another process drives it.
    """
    with (folder / LOCK).open("a", encoding="utf-8") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise PosttrainError(
                "another process drives this sweep",
                where=str(folder),
                fix=f"wait for it, or stop it with Ctrl-C; `posttrain report {folder}` shows its "
                "table at any time",
            ) from error
        except OSError:
            pass  # a file system without locks
        yield
