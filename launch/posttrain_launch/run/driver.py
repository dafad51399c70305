"""Drives one frozen run from preparing its data to its FINISHED file."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import yaml

from posttrain_dist.attempts.fall_back import fall_back, next_choice
from posttrain_dist.attempts.train_apart import train_apart
from posttrain_dist.config import Local, RunConfig, Slurm
from posttrain_dist.errors import OutOfMemory, PosttrainError
from posttrain_dist.files import write_atomic
from posttrain_dist.files.temporary import remove_abandoned
from posttrain_dist.logs import unfailing
from posttrain_dist.report.run.progress import Progress
from posttrain_dist.run import (
    discard_outcome,
    discard_refused,
    finish,
    finished_line,
    report_data,
)
from posttrain_launch.failures import STOPPED, print_error
from posttrain_launch.lifecycle.deadline import stopped_before_end
from posttrain_launch.lifecycle.decide import Cause
from posttrain_launch.lifecycle.starts import policy_of, this_job
from posttrain_launch.ray.child import Job, started
from posttrain_launch.run.driver_lock import LOCK
from posttrain_launch.run.recorded_start import cause_of, code_of, recorded_start
from posttrain_launch.run.stop_request import request_stop, requested_cause, stopped_by_signals

LOCK_WAIT_S = 120.0  # for a driver that Slurm is about to end

Change = Callable[[Path, RunConfig], contextlib.AbstractContextManager[RunConfig]]


def run_frozen(
    run_folder: Path,
    address: str | None = None,
    *,
    debug: bool = False,
    new: bool = False,
    change: Change | None = None,
) -> int:
    """Run, or go on with, the run of a folder; prints as it goes.

    Args:
        run_folder: made by `posttrain_launch.run.freeze.freeze`.
        address: "host:port" of a running Ray to use.
        debug: show the stack trace of an error.
        new: the folder was made for this start; if that is refused, it is removed.
        change: of the frozen run before it starts, once nobody else drives it.

    Returns:
        The exit code, see `Exit`.
    """
    out, err = sys.stdout, sys.stderr
    folder = run_folder.absolute()
    log = folder / "logs" / "driver.log"
    try:
        config = read_frozen(folder)
        if (folder / "FINISHED").is_file() and change is None:
            print(finished_line(folder), file=out)
            return 0
        log.parent.mkdir(exist_ok=True)
        remove_abandoned()
        with exclusive_lock(folder, config), redirect_output(log, capture_logging=True):
            changed = change(folder, config) if change else contextlib.nullcontext(config)
            with changed as config, recorded_start(folder, policy_of(config)) as start:
                start.cause = _drive(config, folder, address, out, err)
            return start.code
    except KeyboardInterrupt:
        print(f"left at once; `posttrain run {folder}` goes on from its last save", file=err)
        return STOPPED
    except Exception as error:
        print_error(error, debug=debug, log=log if log.parent.is_dir() else None, err=err)
        if new and isinstance(error, PosttrainError) and discard_refused(folder, error):
            with contextlib.suppress(OSError):
                folder.parent.rmdir()  # of the name, if this was its first run
            print("  nothing was begun, and no run folder is left", file=err)
        elif isinstance(error, PosttrainError) and log.parent.is_dir():
            print(f"  run folder: {folder}", file=err)
        return code_of(cause_of(error))


def read_frozen(folder: Path) -> RunConfig:
    """The configuration of a run folder.

    Raises:
        PosttrainError: it is no run folder.
    """
    path = folder / "config.yaml"
    if not path.is_file():
        raise PosttrainError(
            "is no run folder: it has no config.yaml",
            where=str(folder),
            fix="give a folder that `posttrain train` made, such as outputs/<name>/<time>",
        )
    try:
        return RunConfig.from_yaml(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        what = str(error).strip().splitlines()[0]
        raise PosttrainError(
            f"is no frozen config: {what}",
            where=str(path),
            fix="bring the file back from a copy, or start a new run",
        ) from error


def _drive(
    config: RunConfig, folder: Path, address: str | None, out: IO[str], err: IO[str]
) -> Cause:
    from posttrain_dist.report.run.run_text import run_text

    def log(line: str) -> None:
        print(line, file=out, flush=True)

    log(f"run folder: {folder}")
    discard_outcome(folder)
    is_prepared = False
    while True:
        try:
            with _ray_job(config, folder, address) as job:
                if job is not None and job.joined and not isinstance(config.cluster, Slurm):
                    job.wait_until_joined()
                if not is_prepared:
                    log(prepare_run(config, folder, err))
                    is_prepared = True
                with Progress(folder, out) as progress, _stops(folder, progress.post):
                    if job is not None:
                        job.finish()
                    elif next_choice(folder) is not None:
                        train_apart(config, folder)
                    else:
                        with redirect_output(folder / "logs" / "rank-0.log"):
                            from posttrain_dist.train import train

                            train(config, folder)
            break
        except OutOfMemory as failure:
            config, line = fall_back(config, folder, failure)
            log(line)

    outcome = finish(config, folder, log)
    if outcome.completed:
        log(f"\n{run_text(folder)}")
        return Cause.finished
    cause = requested_cause(folder)
    next_start = "go on with: posttrain run" if cause is Cause.stopped else "its job goes on with"
    left = f"saved and left at step {outcome.step} of {outcome.total_steps}; {next_start} {folder}"
    log(left)
    print(left)  # to driver.log: a `tee` that Ctrl-C ended shows nothing
    return cause


@contextlib.contextmanager
def _stops(folder: Path, log: Callable[[str], None]) -> Iterator[None]:
    """What ends a training early: signals, and the end of the job that it runs in."""

    def time_limit(line: str) -> None:
        try:
            request_stop(folder, Cause.time_limit)
            log(line)
        except OSError as error:
            log(f"{line}; cannot ask the run to save: {error}")

    with stopped_by_signals(folder, log=log), stopped_before_end(folder, time_limit):
        yield


def prepare_run(config: RunConfig, folder: Path, err: IO[str]) -> str:
    """Prepare the data, and write their report; the counts of it."""
    from posttrain_dist.prepare import prepare
    from posttrain_dist.report.data.prepare_progress import progress_output

    with progress_output(err) as output:
        summary = prepare(config, folder / "prepared", **output)
    counts = report_data(config, folder)
    _record_hashes(folder, summary.inputs)
    return counts


@contextlib.contextmanager
def _ray_job(config: RunConfig, folder: Path, address: str | None) -> Iterator[Job | None]:
    """The Ray job of the run, which starts at once, beside us; None: this process trains."""
    if isinstance(config.cluster, Local):
        yield None
        return
    with started(config, folder, address) as job:
        yield job


def _record_hashes(folder: Path, inputs: dict[str, Any]) -> None:
    """Add the digests of data and tokenizer to the run's lineage."""
    path = folder / "run.json"
    if not path.is_file():
        return
    lineage = json.loads(path.read_text(encoding="utf-8"))
    digests: dict[str, Any] = {name: inputs[name] for name in ("data", "tokenizer", "template")}
    shown = (folder / "data_report.json").read_bytes()
    digests["data_report"] = hashlib.sha256(shown).hexdigest()
    lineage["hashes"] = {**lineage.get("hashes", {}), **digests}
    write_atomic(path, json.dumps(lineage, indent=1) + "\n", to_disk=True)


# ------------------------------------------------------------------------------ surroundings


@contextlib.contextmanager
def exclusive_lock(folder: Path, config: RunConfig) -> Iterator[None]:
    """Hold the folder against a second driver; the file says who the first one is.

    In a Slurm job the driver of the start before this one may live on for a while: on a node that
    was cut off, until Slurm ends what it finds there.
    """
    in_job = isinstance(config.cluster, Slurm) and this_job().restart_count > 0
    deadline = time.monotonic() + (LOCK_WAIT_S if in_job else 0.0)
    with (folder / LOCK).open("a+", encoding="utf-8") as stream:
        while not _lock(stream):
            if time.monotonic() >= deadline:
                raise PosttrainError(
                    "another process drives this run",
                    where=str(folder),
                    fix="wait for it, or stop it with Ctrl-C",
                )
            time.sleep(0.5)
        stream.truncate(0)
        print(os.getpid(), platform.node(), file=stream, flush=True)
        yield


def _lock(stream: IO[str]) -> bool:
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass  # a file system without locks
    return True


@contextlib.contextmanager
def redirect_output(path: Path, *, capture_logging: bool = False) -> Iterator[None]:
    """Send what libraries print (and log and warn) to a file; our own lines go past it."""
    # Left open: handlers that libraries bind to it live on after the run.
    stream = unfailing(path.open("a", buffering=1, encoding="utf-8"))
    with contextlib.redirect_stdout(stream), contextlib.redirect_stderr(stream):
        if not capture_logging:
            yield
            return
        handler = logging.StreamHandler(stream)
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        root = logging.getLogger()
        root.addHandler(handler)
        logging.captureWarnings(True)
        try:
            yield
        finally:
            logging.captureWarnings(False)
            root.removeHandler(handler)
