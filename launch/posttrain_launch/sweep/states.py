"""Where a trial stands, from its run folder alone."""

from __future__ import annotations

import contextlib
import fcntl
import json
import shutil
from pathlib import Path
from typing import Any

from posttrain_dist.files import read_object, write_atomic
from posttrain_launch.sweep.folder import PRUNED, State, Trial

FAILED = "failed.json"  # in a trial's folder: what the driver of the sweep saw of its end


def state_of(trial: Trial) -> State:
    """Where a trial stands."""
    folder = trial.folder
    if (folder / "FINISHED").is_file():
        return State.done
    if is_driven(folder):
        return State.running
    if (folder / PRUNED).is_file():
        return State.pruned
    if was_stopped(folder):
        return State.stopped
    if (folder / FAILED).is_file():
        return State.failed
    return State.stopped if (folder / "metrics.jsonl").is_file() else State.waiting


def is_frozen(trial: Trial) -> bool:
    """Whether the trial has a run folder that is complete."""
    return (trial.folder / "config.yaml").is_file()  # written last


def is_driven(folder: Path) -> bool:
    """Whether a living process drives the run of a folder."""
    lock = folder / "logs" / "driver.lock"
    try:
        with lock.open("r", encoding="utf-8") as stream:
            fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # there is no such file, or no locks there
        return False
    return False


def was_stopped(folder: Path) -> bool:
    """Whether the last start of a run saved and left because it was to, or it was cancelled."""
    with contextlib.suppress(OSError):
        if (folder / "STOP").read_text(encoding="utf-8").strip() == "cancel":
            return True
    with contextlib.suppress(OSError, ValueError):
        return read_object(folder / "logs" / "outcome.json").get("outcome") == "stopped"
    return False


def code_of_last_start(folder: Path) -> int | None:
    """The exit code of a run's last start; None: it left none, for it was killed, or still runs."""
    with contextlib.suppress(OSError, ValueError):
        lines = (folder / "logs" / "starts.jsonl").read_text(encoding="utf-8").splitlines()
        code = json.loads(lines[-1]).get("code") if lines else None
        return code if isinstance(code, int) else None
    return None


def clear_partial(trial: Trial) -> None:
    """Remove what a kill left of a run folder that was just being made."""
    if trial.folder.is_dir() and not is_frozen(trial):
        shutil.rmtree(trial.folder)


# ------------------------------------------------------------------------------------- failures


def record_failure(trial: Trial, code: int, error: BaseException | None = None) -> None:
    """Keep that a trial failed.

    Args:
        code: exit code, or a signal's number negative.
        error: that refused it before it began.
    """
    fields: dict[str, Any] = {"code": code}
    if error is not None:
        text = str(error).strip() or type(error).__name__
        fields["error"] = text.splitlines()[0]
    trial.folder.mkdir(exist_ok=True)
    write_atomic(trial.folder / FAILED, json.dumps(fields) + "\n", to_disk=True)


def read_failure(trial: Trial) -> dict[str, Any]:
    """What `record_failure` kept; empty where there is nothing."""
    with contextlib.suppress(OSError, ValueError):
        return read_object(trial.folder / FAILED)
    return {}


def forget_failure(trial: Trial) -> None:
    """Let a trial that failed be started again."""
    (trial.folder / FAILED).unlink(missing_ok=True)
