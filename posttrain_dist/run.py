"""One run in this process: prepare, train, report, FINISHED. No Hydra and no Ray.

This is what a Python program calls; `posttrain train` drives a run by the same parts, with workers
of Ray where the config says so, and ends it by the same `finish`.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from posttrain_dist.attempts.fall_back import fall_back, next_choice
from posttrain_dist.attempts.train_apart import train_apart
from posttrain_dist.config import Local, RunConfig, complete
from posttrain_dist.errors import ConfigError, OutOfMemory, PosttrainError
from posttrain_dist.files import write_atomic
from posttrain_dist.planner.fallbacks import is_auto, with_choice
from posttrain_dist.planner.plan_file import read_choice, write_plan
from posttrain_dist.planner.settle import rehearsed, settle


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a training ended, as rank 0 leaves it in logs/outcome.json."""

    completed: bool  # else it was stopped, with a checkpoint to go on from
    step: int
    total_steps: int
    early_stop: str | None = None  # the alarm that ended it before total_steps


def run(config: RunConfig, folder: Path, *, progress: bool = True) -> Outcome:
    """Prepare the data, train as the only worker, and write the report and FINISHED.

    A run that was stopped (by a file STOP, which rank 0 looks for, or killed) goes on from its
    newest checkpoint when it is called again; a finished one is left as it is. What libraries
    print goes to logs/rank-0.log.

    Args:
        config: of the run; `config.cluster` is Local, and relative paths are those of this process.
        folder: the run folder; made if it is not there, and not left behind by a refused start.
        progress: print the lines that `posttrain train` prints.

    Returns:
        How the training ended.

    Raises:
        PosttrainError: config, data, model or checkpoint cannot be used.
    """
    config, folder = complete(config), Path(folder).absolute()
    if not isinstance(config.cluster, Local):
        raise ConfigError(
            f"is {type(config.cluster).__name__.lower()}, and this call trains in its own process",
            where="cluster",
            fix="leave cluster out, or start the run with `posttrain train`",
        )
    log = _print if progress else _discard_line
    if (folder / "FINISHED").is_file():
        log(finished_line(folder))
        return read_outcome(folder)
    is_new = not folder.exists()
    try:
        outcome = _train(_settled(config, folder, log), folder, progress, log)
    except PosttrainError as error:
        if is_new:
            discard_refused(folder, error)
        raise
    if outcome.completed:
        from posttrain_dist.report.run.run_text import run_text

        log(f"\n{run_text(folder)}")
    else:
        log(f"saved and left at step {outcome.step} of {outcome.total_steps}; call again to go on")
    return outcome


def _settled(config: RunConfig, folder: Path, log: Callable[[str], None]) -> RunConfig:
    """The run with nothing left to choose, planned at its first start."""
    choice = read_choice(folder)
    if choice is not None:
        is_open = is_auto(config)
        return complete(rehearsed(with_choice(config, choice.chosen))) if is_open else config
    settled = settle(config)
    for line in settled.lines:
        log(line)
    if settled.choice is not None:
        folder.mkdir(parents=True, exist_ok=True)
        write_plan(folder, settled.choice)
        write_atomic(folder / "config.yaml", settled.config.to_yaml())
    return settled.config


def _train(config: RunConfig, folder: Path, progress: bool, log: Callable[[str], None]) -> Outcome:
    from posttrain_dist.prepare import prepare
    from posttrain_dist.report.data.prepare_progress import progress_output
    from posttrain_dist.report.run.progress import Progress
    from posttrain_dist.train import train

    log(f"run folder: {folder}")
    discard_outcome(folder)
    out, shown = sys.stdout, contextlib.ExitStack()
    with shown:
        output = shown.enter_context(progress_output(sys.stderr)) if progress else {}
        prepare(config, folder / "prepared", **output)
    log(report_data(config, folder))
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    # Left open: handlers that libraries bind to it live on after the run.
    stream = (folder / "logs" / "rank-0.log").open("a", buffering=1, encoding="utf-8")
    while True:
        try:
            with contextlib.ExitStack() as shown:
                if progress:
                    shown.enter_context(Progress(folder, out))
                shown.enter_context(contextlib.redirect_stdout(stream))
                shown.enter_context(contextlib.redirect_stderr(stream))
                if next_choice(folder) is not None:
                    train_apart(config, folder)
                else:
                    train(config, folder)
            return finish(config, folder, log)
        except OutOfMemory as failure:
            config, line = fall_back(config, folder, failure)
            log(line)


def report_data(config: RunConfig, folder: Path) -> str:
    """Write the report of the prepared data into the run folder; its counts as text."""
    from posttrain_dist.prepare.data_report import write_data_report
    from posttrain_dist.report.data.data_page import write_data_page
    from posttrain_dist.report.data.data_text import counts_text, formats_line

    report = write_data_report(config, folder / "prepared", folder)
    page = write_data_page(report, folder)
    return "\n".join(["", counts_text(report), formats_line(report), f"data report: {page}", ""])


def finished_line(folder: Path) -> str:
    """What is said of a run that is called again after its end."""
    return f"{folder} is already finished; `posttrain report {folder}` renews its page"


def discard_refused(folder: Path, error: PosttrainError) -> bool:
    """Remove a new run folder if its start was refused before anything was begun.

    Args:
        folder: that was made for this start.
        error: that refused it; where it points into the folder, that is kept.

    Returns:
        Whether it was removed.
    """
    begun = ("metrics.jsonl", "checkpoints", "logs/plan.json")
    if isinstance(error, OutOfMemory):
        return False  # the log of the rank says more
    if str(folder) in str(error) or any((folder / name).exists() for name in begun):
        return False
    shutil.rmtree(folder, ignore_errors=True)
    return not folder.exists()


def _print(line: str) -> None:
    print(line, flush=True)


def _discard_line(line: str) -> None:
    pass


def discard_outcome(folder: Path) -> None:
    """Remove what an earlier start of the run left about its end."""
    for stale in (folder / "STOP", folder / "logs" / "outcome.json"):
        stale.unlink(missing_ok=True)


def read_outcome(folder: Path) -> Outcome:
    """How the training of a run folder ended.

    Raises:
        PosttrainError: it did not say.
    """
    path = folder / "logs" / "outcome.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return Outcome(
            completed=found["outcome"] == "completed",
            step=found["step"],
            total_steps=found["total_steps"],
            early_stop=found.get("early_stop"),
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise PosttrainError(
            "the training ended without saying how",
            where=str(path),
            fix=f"see {folder / 'logs'}; `posttrain run {folder}` goes on from its last save",
        ) from error


def finish(
    config: RunConfig, folder: Path, log: Callable[[str], None] = lambda line: None
) -> Outcome:
    """End a run whose training completed: answers before and after, report.html, FINISHED.

    Args:
        config: of the run.
        folder: the run folder, with the outcome of the training in logs/outcome.json.
        log: called with what the user should know.

    Returns:
        The outcome; if the training was stopped, nothing is written.

    Raises:
        PosttrainError: the training did not say how it ended.
    """
    outcome = read_outcome(folder)
    if not outcome.completed:
        return outcome
    from posttrain_dist.export import made_folder
    from posttrain_dist.report import write_report

    has_made = (folder / made_folder(config)).is_dir()
    if config.eval.generate_rows > 0 and has_made and config.objective.trains_answers:
        from posttrain_dist.evaluation.answers import compare

        log("asking the model before and after ...")
        compare(config, folder)
    write_report(folder)
    if outcome.early_stop:
        log(f"ended early at step {outcome.step}: {outcome.early_stop}")
    reason = "early_stop" if outcome.early_stop else "completed"
    finished = {"reason": reason, "step": outcome.step}
    write_atomic(folder / "FINISHED", json.dumps(finished) + "\n", to_disk=True)
    return outcome
