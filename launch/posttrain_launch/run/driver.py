"""Drives one frozen run from preparing its data to its FINISHED file."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import IO, Any

from posttrain_dist.attempts.fall_back import fall_back, next_choice
from posttrain_dist.attempts.train_apart import SIGNALS, train_apart
from posttrain_dist.config import Local, RunConfig
from posttrain_dist.errors import ClusterLost, OutOfMemory, PosttrainError
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
from posttrain_launch.failures import FAILED, STOPPED, print_error
from posttrain_launch.lifecycle.exit_codes import Exit
from posttrain_launch.ray.child import Job, started

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
        The exit code: 0 finished, 130 stopped by a signal (it can go on), 1 failed.
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
        with _exclusive_lock(folder), _redirect_output(log, capture_logging=True):
            changed = change(folder, config) if change else contextlib.nullcontext(config)
            with changed as config:
                return _drive(config, folder, address, out, err)
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
        return Exit.requeue if isinstance(error, ClusterLost) else FAILED


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
    return RunConfig.from_yaml(path.read_text(encoding="utf-8"))


def _drive(config: RunConfig, folder: Path, address: str | None, out: IO[str], err: IO[str]) -> int:
    from posttrain_dist.report.run.run_text import run_text

    def log(line: str) -> None:
        print(line, file=out, flush=True)

    log(f"run folder: {folder}")
    discard_outcome(folder)
    is_prepared = False
    while True:
        try:
            with _ray_job(config, folder, address) as job:
                if not is_prepared:
                    log(_prepare(config, folder, err))
                    is_prepared = True
                with Progress(folder, out) as progress, _stop_on_signals(folder, progress.post):
                    if job is not None:
                        job.finish()
                    elif next_choice(folder) is not None:
                        train_apart(config, folder)
                    else:
                        with _redirect_output(folder / "logs" / "rank-0.log"):
                            from posttrain_dist.train import train

                            train(config, folder)
            break
        except OutOfMemory as failure:
            config, line = fall_back(config, folder, failure)
            log(line)

    outcome = finish(config, folder, log)
    if not outcome.completed:
        place = f"step {outcome.step} of {outcome.total_steps}"
        left = f"saved and left at {place}; go on with: posttrain run {folder}"
        log(left)
        print(left)  # to driver.log: a `tee` that Ctrl-C ended shows nothing
        return STOPPED
    log(f"\n{run_text(folder)}")
    return 0


def _prepare(config: RunConfig, folder: Path, err: IO[str]) -> str:
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
def _stop_on_signals(folder: Path, log: Callable[[str], None]) -> Iterator[None]:
    """First signal: ask the run to save and end. A second Ctrl-C: leave.

    A hang-up that was ignored when we started (`nohup`) stays ignored.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    asked = False

    def handle(number: int, _: FrameType | None) -> None:
        nonlocal asked
        if asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        if not asked:
            asked = True
            once_more = "; Ctrl-C once more to leave now" if number == signal.SIGINT else ""
            name = signal.Signals(number).name
            try:
                (folder / "STOP").touch()
                log(f"{name}: saving and leaving{once_more}")
            except OSError as error:  # of a full disk, or a folder that was removed
                log(f"{name}: cannot ask the run to save: {error}{once_more}")

    nohup = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    held = [number for number in SIGNALS if not (nohup and number == signal.SIGHUP)]
    before = {number: signal.signal(number, handle) for number in held}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _exclusive_lock(folder: Path) -> Iterator[None]:
    """Hold the folder against a second driver."""
    with (folder / "logs" / "driver.lock").open("w", encoding="utf-8") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise PosttrainError(
                "another process drives this run",
                where=str(folder),
                fix="wait for it, or stop it with Ctrl-C",
            ) from error
        except OSError:
            pass  # a file system without locks
        yield


@contextlib.contextmanager
def _redirect_output(path: Path, *, capture_logging: bool = False) -> Iterator[None]:
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
