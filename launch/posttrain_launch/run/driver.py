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

from posttrain_dist.config import Local, RunConfig
from posttrain_dist.errors import PosttrainError
from posttrain_dist.files import write_whole
from posttrain_launch.failures import FAILED, STOPPED, tell
from posttrain_launch.run.progress import Progress

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


def run_frozen(run_folder: Path, address: str | None = None, *, debug: bool = False) -> int:
    """Run, or go on with, the run of a folder; prints as it goes.

    Args:
        run_folder: made by `posttrain_launch.run.freeze.freeze`.
        address: "host:port" of a running Ray to use.
        debug: show the stack trace of an error.

    Returns:
        The exit code: 0 finished, 130 stopped by a signal (it can go on), 1 failed.
    """
    out, err = sys.stdout, sys.stderr
    folder = run_folder.absolute()
    log = folder / "logs" / "driver.log"
    try:
        config = read_frozen(folder)
        if (folder / "FINISHED").is_file():
            print(f"{folder} is finished; `posttrain report {folder}` renews its page", file=out)
            return 0
        log.parent.mkdir(exist_ok=True)
        with _alone(folder), _noise_to(log):
            return _drive(config, folder, address, out, err)
    except KeyboardInterrupt:
        print(f"left at once; `posttrain run {folder}` goes on from its last save", file=err)
        return STOPPED
    except Exception as error:
        tell(error, debug=debug, log=log if log.parent.is_dir() else None, err=err)
        if isinstance(error, PosttrainError) and log.parent.is_dir():
            print(f"  run folder: {folder}", file=err)
        return FAILED


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
    from posttrain_dist.prepare import prepare
    from posttrain_dist.prepare.data_report import write_data_report
    from posttrain_dist.report.data.data_page import write_data_page
    from posttrain_dist.report.data.data_text import counts_text, formats_line
    from posttrain_launch.run.prepare_progress import progress_output

    print(f"run folder: {folder}", file=out, flush=True)
    for stale in (folder / "STOP", folder / "logs" / "outcome.json"):
        stale.unlink(missing_ok=True)
    with _workers(config, folder, address) as train:
        with progress_output(err) as lines:
            summary = prepare(config, folder / "prepared", **lines)
        report = write_data_report(config, folder / "prepared", folder)
        page = write_data_page(report, folder)
        _record_hashes(folder, summary.inputs)
        found = [counts_text(report), formats_line(report), f"data report: {page}"]
        print("", *found, "", sep="\n", file=out, flush=True)
        with Progress(folder, out) as progress, _stop_on_signals(folder, progress.log):
            train()

    outcome = _outcome(folder)
    if outcome["outcome"] != "completed":
        place = f"step {outcome['step']} of {outcome['total_steps']}"
        print(f"saved and left at {place}; go on with: posttrain run {folder}", file=out)
        return STOPPED
    _finish(config, folder, outcome, out)
    return 0


@contextlib.contextmanager
def _workers(config: RunConfig, folder: Path, address: str | None) -> Iterator[Callable[[], None]]:
    """What trains once the data is prepared; Ray's part of it starts at once, beside us."""
    if isinstance(config.cluster, Local):
        from posttrain_launch.run import local

        yield lambda: local.run(config, folder)
        return
    from posttrain_launch.ray import child as ray_driver

    with ray_driver.started(config, folder, address) as job:
        yield job.finish


def _finish(config: RunConfig, folder: Path, outcome: dict[str, Any], out: IO[str]) -> None:
    """What follows a completed training: answers, report, FINISHED, and the table."""
    from posttrain_dist.report import write_report
    from posttrain_dist.report.run.run_text import run_text

    has_export = (folder / "export" / "config.json").is_file()
    if config.eval.generate_rows > 0 and has_export and config.objective.rows == "messages":
        from posttrain_dist.evaluation.answers import compare

        print("asking the model before and after ...", file=out, flush=True)
        compare(config, folder)
    write_report(folder)
    early = outcome.get("early_stop")
    if early:
        print(f"ended early at step {outcome['step']}: {early}", file=out, flush=True)
    finished = {"reason": "early_stop" if early else "completed", "step": outcome["step"]}
    write_whole(folder / "FINISHED", json.dumps(finished) + "\n", to_disk=True)
    print(f"\n{run_text(folder)}", file=out, flush=True)


def _outcome(folder: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads((folder / "logs" / "outcome.json").read_text())
        return found
    except (OSError, ValueError) as error:
        raise PosttrainError(
            "the training ended without saying how",
            where=str(folder / "logs" / "outcome.json"),
            fix=f"see {folder / 'logs'}; `posttrain run {folder}` goes on from its last save",
        ) from error


def _record_hashes(folder: Path, inputs: dict[str, Any]) -> None:
    """Add the digests of data and tokenizer to the run's lineage."""
    path = folder / "run.json"
    if not path.is_file():
        return
    lineage = json.loads(path.read_text())
    digests: dict[str, Any] = {name: inputs[name] for name in ("data", "tokenizer", "template")}
    shown = (folder / "data_report.json").read_bytes()
    digests["data_report"] = hashlib.sha256(shown).hexdigest()
    lineage["hashes"] = {**lineage.get("hashes", {}), **digests}
    write_whole(path, json.dumps(lineage, indent=1) + "\n", to_disk=True)


# ------------------------------------------------------------------------------ surroundings


@contextlib.contextmanager
def _stop_on_signals(folder: Path, say: Callable[[str], None]) -> Iterator[None]:
    """First signal: ask the run to save and end. A second Ctrl-C: leave."""
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
            (folder / "STOP").touch()
            once_more = "; Ctrl-C once more to leave now" if number == signal.SIGINT else ""
            say(f"{signal.Signals(number).name}: saving and leaving{once_more}")

    before = {number: signal.signal(number, handle) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold the folder against a second driver."""
    with (folder / "logs" / "driver.lock").open("w") as stream:
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
def _noise_to(log: Path) -> Iterator[None]:
    """Send what libraries print, log and warn to a file; our own lines go past it."""
    # Left open: handlers that libraries bind to it live on after the run.
    stream = log.open("a", buffering=1, encoding="utf-8")
    handler = logging.StreamHandler(stream)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger()
    root.addHandler(handler)
    logging.captureWarnings(True)
    try:
        with contextlib.redirect_stdout(stream), contextlib.redirect_stderr(stream):
            yield
    finally:
        logging.captureWarnings(False)
        root.removeHandler(handler)
