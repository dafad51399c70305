"""Drives several LoRA runs in one process, over one frozen base, each to a FINISHED of its own."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from posttrain_dist.config import RunConfig
from posttrain_dist.run import discard_outcome, finish, finished_line
from posttrain_launch.failures import print_error
from posttrain_launch.lifecycle.deadline import stopped_before_end
from posttrain_launch.lifecycle.decide import Cause
from posttrain_launch.lifecycle.starts import policy_of
from posttrain_launch.run.driver import exclusive_lock, prepare_run, read_frozen, redirect_output
from posttrain_launch.run.recorded_start import RecordedStart, cause_of, code_of, recorded_start
from posttrain_launch.run.stop_request import request_stop, requested_cause, stopped_by_signals


def run_together(folders: Sequence[Path], *, debug: bool = False) -> int:
    """Run, or go on with, the runs of several folders in this process; prints as it goes.

    What one of them meets, an error or a request to stop, leaves the others alone.

    Args:
        folders: run folders; those that are finished are left as they are.
        debug: show the stack trace of an error.

    Returns:
        0 if every run is finished, else the exit code of the first that is not; see `Exit`.
    """
    try:
        given = list(dict.fromkeys(folder.absolute() for folder in folders))
        runs = {folder: read_frozen(folder) for folder in given}
        for folder in given:
            if (folder / "FINISHED").is_file():
                print(finished_line(folder))
                del runs[folder]
        codes = _drive(runs, debug) if runs else []
    except Exception as error:
        print_error(error, debug=debug)
        return code_of(cause_of(error))
    return next((code for code in codes if code), 0)


def _drive(runs: dict[Path, RunConfig], debug: bool) -> list[int]:
    """Train them, and end each; their exit codes."""
    from posttrain_dist.together.compatible import check_together

    check_together(list(runs.values()))
    out, err = sys.stdout, sys.stderr

    def log(line: str) -> None:
        print(line, file=out, flush=True)

    with _entered(runs) as starts:
        for folder, config in runs.items():
            log(f"run folder: {folder}")
            discard_outcome(folder)
            counts = prepare_run(config, folder, err)
        log(counts)  # the same rows for all of them
        with _stops(list(runs), log):
            from posttrain_dist.together.train_together import train_together

            errors = train_together([(config, folder) for folder, config in runs.items()])
        for (folder, config), error in zip(runs.items(), errors, strict=True):
            try:
                if error is not None:
                    raise error
                outcome = finish(config, folder, log)
                finished = outcome.completed
                starts[folder].cause = Cause.finished if finished else requested_cause(folder)
                place = "finished" if finished else f"saved and left at step {outcome.step}"
                log(f"{folder.name}: {place}")
            except Exception as failure:
                starts[folder].cause = cause_of(failure)
                print_error(failure, debug=debug, log=folder / "logs" / "driver.log", err=err)
                log(f"{folder.name}: failed")
        return [start.code for start in starts.values()]


@contextlib.contextmanager
def _entered(runs: dict[Path, RunConfig]) -> Iterator[dict[Path, RecordedStart]]:
    """Hold every folder, with a start of its own recorded; what libraries print goes to the first.

    Raises:
        PosttrainError: another process drives one of them.
    """
    with contextlib.ExitStack() as stack:
        for folder, config in runs.items():
            (folder / "logs").mkdir(exist_ok=True)
            stack.enter_context(exclusive_lock(folder, config))
        starts = {
            folder: stack.enter_context(recorded_start(folder, policy_of(config), runs=len(runs)))
            for folder, config in runs.items()
        }
        first = next(iter(runs)) / "logs" / "driver.log"
        stack.enter_context(redirect_output(first, capture_logging=True))
        yield starts


@contextlib.contextmanager
def _stops(folders: list[Path], log: Callable[[str], None]) -> Iterator[None]:
    """What ends all of them early: signals, and the end of the job that they run in."""

    def time_limit(line: str) -> None:
        for folder in folders:
            request_stop(folder, Cause.time_limit)
        log(line)

    with stopped_by_signals(*folders, log=log), stopped_before_end(folders[0], time_limit):
        yield
