"""What came of a sweep, as plain data: for the table, and for sweep.html.

{"name", "folder", "command", "created", "metric", "direction", "keys": [those that vary], "unit":
 "GPU" or "process", "best": number of the best trial or null, "winner": its command or null,
 "trials": [{"number", "overrides", "varied": {key: text}, "state", "error", "value", "step",
             "total_steps", "seconds", "workers", "cost_s": seconds x GPUs, shared by
             the trials of one process, "memory_bytes": of the whole process,
             "curves": {held-out key of metrics.jsonl: [[step, value], ...]}, "folder", "extra"}]}

Trials come with the best first; those without a value last, by number.
"""

from __future__ import annotations

import contextlib
import math
import shlex
from pathlib import Path
from typing import Any

import yaml

from posttrain_dist.errors import ClusterError
from posttrain_dist.files import read_object, read_rows
from posttrain_launch.batch.array import ArrayQueue, Task
from posttrain_launch.lifecycle import starts
from posttrain_launch.sweep.folder import State, Sweep, Trial, read_trials
from posttrain_launch.sweep.states import read_failure, state_of

HELD_OUT = ("eval/loss", "eval_channel_loss/")  # keys of a curve, or what they begin with


def read_results(sweep: Sweep, metric: str | None = None) -> dict[str, Any]:
    """What the folders of a sweep's trials hold now.

    Args:
        metric: a key of metrics.jsonl in place of the sweep's own.
    """
    metric = metric or sweep.metric
    direction = sweep.direction if metric == sweep.metric else direction_of(metric)
    trials = read_trials(sweep.folder)
    shared = shared_overrides(trials) or set(sweep.shared)
    jobs = _jobs(sweep)
    rows = [_row(trial, shared, metric, jobs) for trial in trials]
    sign = -1.0 if direction == "maximize" else 1.0

    def order(row: dict[str, Any]) -> tuple[float, int]:
        return (math.inf if row["value"] is None else sign * row["value"], row["number"])

    rows.sort(key=order)
    # One that was given up early, or that failed, is no winner: its value is of fewer steps.
    done = [row for row in rows if row["state"] == "done" and row["value"] is not None]
    best = done[0] if done else None
    return {
        "name": sweep.name,
        "folder": str(sweep.folder),
        "command": sweep.command,
        "created": sweep.created,
        "metric": metric,
        "direction": direction,
        "keys": list(dict.fromkeys(key for row in rows for key in row["varied"])),
        "unit": "GPU" if any(row["gpus"] for row in rows) else "process",
        "best": None if best is None else best["number"],
        "winner": None if best is None else winner_command(sweep, best["overrides"]),
        "trials": rows,
    }


def direction_of(metric: str) -> str:
    """Which way a metric is better, by its name: accuracies, margins and log-probabilities grow."""
    name = metric.partition("/")[0] if "_channel_" in metric else metric.rpartition("/")[2]
    grows = name.endswith(("accuracy", "margin", "chosen_logprob", "desirable_logprob"))
    return "maximize" if grows else "minimize"


def shared_overrides(trials: list[Trial]) -> set[str]:
    """Overrides that every trial has; of a single trial nobody can say."""
    if len(trials) < 2:
        return set()
    return set.intersection(*(set(trial.overrides) for trial in trials))


def winner_command(sweep: Sweep, overrides: list[str]) -> str:
    """The command that trains as a trial did, in a run folder of its own."""
    verb = "submit" if sweep.backend.get("kind") == "slurm_array" else "train"
    words = ["posttrain", verb, *overrides]
    for flag, value in (
        ("--config-dir", sweep.config_dir),
        ("--config-path", sweep.config_path),
        ("--config-name", sweep.config_name),
    ):
        words += [] if value is None else [flag, value]
    return shlex.join(words)


def _jobs(sweep: Sweep) -> dict[int, Task]:
    """The jobs of a sweep's trials that are in a queue, as far as is known here."""
    if sweep.backend.get("kind") == "slurm_array":
        with contextlib.suppress(ClusterError):
            return ArrayQueue(sweep.folder).tasks()
    return {}


def _state(trial: Trial, jobs: dict[int, Task]) -> State:
    """Where a trial stands; a lock that is held on another node may not be seen on this one."""
    job = jobs.get(trial.number)
    if job is None or (trial.folder / "FINISHED").is_file():
        return state_of(trial)
    return State.running if job.has_begun else State.waiting


def _row(trial: Trial, shared: set[str], metric: str, jobs: dict[int, Task]) -> dict[str, Any]:
    folder = trial.folder
    measured = read_rows(folder / "metrics.jsonl")
    curves: dict[str, list[list[float]]] = {}
    for row in measured:
        for key, value in row.items():
            if key.startswith(HELD_OUT) and _is_finite(value):
                curves.setdefault(key, []).append([row["step"], value])
    values = [row[metric] for row in measured if _is_finite(row.get(metric))]
    seconds = next((row["time_s"] for row in reversed(measured) if "time_s" in row), 0.0)
    workers = len(list((folder / "logs").glob("rank-*.log"))) or 1
    gpus = _gpus_of_worker(folder)
    memory = [row["system/memory_bytes"] for row in measured if "system/memory_bytes" in row]
    varied = [text for text in trial.overrides if text not in shared]
    return {
        "number": trial.number,
        "overrides": list(trial.overrides),
        "varied": dict(_split(text) for text in varied),
        "state": _state(trial, jobs).value,
        "error": read_failure(trial).get("error"),
        "value": values[-1] if values else None,
        "step": measured[-1]["step"] if measured else None,
        "total_steps": _read(folder / "logs" / "plan.json").get("total_steps"),
        "seconds": seconds,
        "workers": workers,
        "gpus": gpus * workers,
        "cost_s": seconds * workers * (gpus or 1) / _runs_together(folder),
        "memory_bytes": int(max(memory)) if memory else None,
        "curves": curves,
        "folder": str(folder),
        "extra": trial.extra,
    }


def _split(override: str) -> tuple[str, str]:
    key, _, value = override.partition("=")
    return key.lstrip("+"), value


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _read(path: Path) -> dict[str, Any]:
    with contextlib.suppress(OSError, ValueError):
        return read_object(path)
    return {}


def _runs_together(folder: Path) -> int:
    """Runs that its newest start trains in one process."""
    found = starts.read(folder)
    return int(found[-1].get("runs", 1)) if found else 1


def _gpus_of_worker(folder: Path) -> float:
    """GPUs of one worker of a run, by its plan; 0: it trains on CPUs, or nothing was planned."""
    plan = _read(folder / "plan.json").get("plan") or {}
    if not plan.get("on_gpu"):
        return 0.0
    with contextlib.suppress(OSError, yaml.YAMLError):
        config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
        return float((config.get("cluster") or {}).get("gpus_per_worker", 1.0))
    return 1.0
