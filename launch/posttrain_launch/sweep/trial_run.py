"""A trial's run folder: its overrides composed, checked and frozen, as those of every run."""

from __future__ import annotations

import contextlib
import os
import shlex
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from posttrain_dist.config import RunConfig
from posttrain_dist.errors import PosttrainError
from posttrain_dist.planner.plan import Choice
from posttrain_launch.compose.composer import Composed, Composer
from posttrain_launch.compose.problems import compose_checked
from posttrain_launch.run.freeze import freeze
from posttrain_launch.sweep.folder import Sweep, Trial

Adjust = Callable[[RunConfig, Choice | None], RunConfig]


@contextlib.contextmanager
def freezing(
    sweep: Sweep,
    prepare: Callable[[RunConfig], RunConfig] | None = None,
    adjust: Adjust | None = None,
) -> Iterator[Callable[[Trial], None]]:
    """What makes the run folder of a trial; it raises PosttrainError where there can be none.

    Args:
        prepare: the config of a trial before it is planned.
        adjust: the config of a trial once its plan is known.
    """
    verb = "submit" if sweep.backend["kind"] == "slurm_array" else "train"
    with Composer(sweep.config_dir, sweep.config_path, sweep.config_name) as composer:

        def freeze_trial(trial: Trial) -> None:
            with _in_folder(Path(sweep.cwd)):
                composed = compose_checked(composer, list(trial.overrides), verb=verb)
                if prepare is not None:
                    composed = replace(composed, config=prepare(composed.config))
                command = shlex.join(["posttrain", "train", *trial.overrides])
                freeze(
                    _grouped(composed, sweep.name),
                    command,
                    force=sweep.force,
                    place=trial.folder,
                    adjust=adjust,
                )

        yield freeze_trial


def _grouped(composed: Composed, group: str) -> Composed:
    """With the sweep as its group in W&B, unless one was named."""
    logging = composed.config.logging
    if logging.group is not None:
        return composed
    config = replace(composed.config, logging=replace(logging, group=group))
    return replace(composed, config=config)


@contextlib.contextmanager
def _in_folder(folder: Path) -> Iterator[None]:
    """Where the sweep was typed: relative paths of its overrides start there."""
    if os.fspath(folder) == os.getcwd():  # noqa: PTH109 - as it was kept
        yield
        return
    if not folder.is_dir():
        raise PosttrainError(
            f"the sweep was started in {folder}, which is gone",
            where="sweep.json",
            fix="make that folder, or start the sweep again",
        )
    with contextlib.chdir(folder):
        yield
