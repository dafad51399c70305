"""The verbs that are Hydra applications: train, prepare, inspect, evaluate, submit."""

from __future__ import annotations

import contextlib
import io
import os
import shlex
import shutil
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra._internal.utils import get_args_parser
from omegaconf import DictConfig

from posttrain_dist.config import complete
from posttrain_dist.errors import ConfigError, PosttrainError, SeveralErrors
from posttrain_dist.preflight import check_inputs
from posttrain_launch.cli import VERBS
from posttrain_launch.compose.composer import Composed, Composer, run_hydra_app, to_composed
from posttrain_launch.compose.problems import check
from posttrain_launch.failures import BAD_CONFIG, FAILED, STOPPED, tell
from posttrain_launch.run.freeze import absolute, freeze
from posttrain_launch.sweep.trials import Sweep

HELP = """posttrain {verb}: {what}

usage: posttrain {verb} [group=option ...] [key=value ...] [flags]

example
  {example}

groups: choose one option each, group=option (+experiment=...)
{groups}

keys: key=value
  the most used are model.path, data.train, train.steps or train.epochs, train.batch_size,
  optimizer.lr; all of them, as this command line sets them, stand at the end of this page.
  A value that holds ( ) [ ] {{ }} , = or ' is quoted twice: 'data.train="/data/a(1).jsonl"'

flags
  --config-dir DIR    a folder of your own YAML: DIR/experiment/NAME.yaml is +experiment=NAME
                      (`posttrain init` writes one)
  --cfg job           print the composed config and leave; --package train: a part of it
  --info defaults     print which YAML files it is made of
  -m, --multirun      one run for each combination of values: optimizer.lr=1e-5,3e-5
  --debug             the stack trace of an error
{more}
config
$CONFIG"""
MORE = {"submit": "  --dry-run           write the job and submit nothing\n"}


@dataclass(slots=True)
class _Call:
    """What was typed, taken apart."""

    verb: str
    words: list[str]  # as given to Hydra
    arguments: Namespace
    debug: bool
    dry_run: bool

    @property
    def typed(self) -> str:
        """The command line, for the run's lineage."""
        return shlex.join(["posttrain", self.verb, *self.words])

    @property
    def shows_only(self) -> bool:
        """Whether a flag asks Hydra to print something and leave."""
        a = self.arguments
        return bool(a.help or a.hydra_help or a.cfg or a.info or a.shell_completion)


def command(verb: str, words: list[str], debug: bool) -> int:
    """Run a Hydra verb; the exit code."""
    call = _read(verb, words, debug)
    arguments = call.arguments
    captured: list[Composed] = []
    sweep = Sweep()
    act = ACTIONS[verb]

    def job(config: DictConfig, hydra: DictConfig) -> float | None:
        if arguments.multirun or str(hydra.mode).endswith("MULTIRUN"):
            return sweep.trial(config, hydra, lambda c: _trial(call, c, sweep))
        captured.append(to_composed(config, hydra))
        return None

    with _argv([f"posttrain {verb}", *call.words]):
        try:
            if not (arguments.hydra_help or arguments.shell_completion):
                check(
                    arguments.overrides,
                    arguments.config_dir,
                    sweep=arguments.multirun,
                    cross=not call.shows_only,
                    verb=None if call.shows_only else verb,
                )
            page = _help(call) if arguments.help else ""
            run_hydra_app(job, page)
        except PosttrainError as error:
            tell(error, debug=debug)
            return BAD_CONFIG
        except KeyboardInterrupt:
            if sweep.trials:
                print(sweep.table())
            return STOPPED
    if arguments.multirun and not call.shows_only:
        print(sweep.table())
        return sweep.exit_code()
    if not captured:
        return 0
    try:
        return act(captured[0], call)
    except (ConfigError, SeveralErrors) as error:
        tell(error, debug=debug)
        return BAD_CONFIG
    except PosttrainError as error:
        tell(error, debug=debug)
        return FAILED


def _read(verb: str, words: list[str], debug: bool) -> _Call:
    dry_run = verb == "submit" and "--dry-run" in words
    words = [w for w in words if not (dry_run and w == "--dry-run")]
    # An experiment is no group with a default, so Hydra wants a plus; nobody need know.
    words = [f"+{w}" if w.startswith("experiment=") else w for w in words]
    with _argv([f"posttrain {verb}", *words]):
        arguments = get_args_parser().parse_args()
    extra = []
    shows_page = arguments.help or arguments.hydra_help or arguments.shell_completion
    if verb == "train" and not arguments.overrides and not shows_page:
        extra.append("+experiment=demo")
        print("no arguments: running the demo (+experiment=demo)", file=sys.stderr)
    if verb == "submit" and not any(w.startswith("cluster=") for w in arguments.overrides):
        extra.append("cluster=slurm")
    arguments.overrides += extra
    return _Call(verb, [*words, *extra], arguments, debug, dry_run)


@contextlib.contextmanager
def _argv(words: list[str]) -> Iterator[None]:
    before, sys.argv = sys.argv, words
    try:
        yield
    finally:
        sys.argv = before


def _help(call: _Call) -> str:
    with Composer(call.arguments.config_dir) as composer:
        rows = {group: ", ".join(composer.options(group)) for group in composer.groups()}
    width = max(map(len, rows))
    verb = VERBS[call.verb]
    return HELP.format(
        verb=call.verb,
        what=verb.what,
        example=verb.example,
        groups="\n".join(f"  {group:<{width}}  {options}" for group, options in rows.items()),
        more=MORE.get(call.verb, ""),
    )


def _trial(call: _Call, composed: Composed, sweep: Sweep) -> tuple[int, Path | None]:
    if call.verb == "train":
        check_inputs(absolute(composed.config))
        folder = freeze(composed, call.typed)
        return sweep.run_apart(["run", str(folder)], call.debug), folder
    words = [call.verb, *composed.overrides]
    if call.arguments.config_dir is not None:
        words += ["--config-dir", call.arguments.config_dir]
    return sweep.run_apart([*words, *(["--dry-run"] if call.dry_run else [])], call.debug), None


# ---------------------------------------------------------------------------------- actions


def _train(composed: Composed, call: _Call) -> int:
    from posttrain_launch.run.driver import run_frozen

    return run_frozen(freeze(composed, call.typed), debug=call.debug)


def _inspect(composed: Composed, _: _Call) -> int:
    from posttrain_dist.prepare import prepare_cached
    from posttrain_dist.prepare.data_report import data_report
    from posttrain_dist.report.data.data_text import data_text, formats_line
    from posttrain_launch.run.prepare_progress import progress_output

    config = complete(absolute(composed.config))
    with progress_output(sys.stderr) as lines:
        prepared = prepare_cached(config, **lines)
    report = data_report(config, prepared)
    color = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    width = shutil.get_terminal_size((100, 24)).columns
    print(data_text(report, width, color, conversations=1))
    print(formats_line(report))
    return 0


def _prepare(composed: Composed, _: _Call) -> int:
    from posttrain_dist.prepare import prepare_cached
    from posttrain_dist.prepare.data_report import write_data_report
    from posttrain_dist.report.data.data_page import write_data_page
    from posttrain_dist.report.data.data_text import data_text, formats_line
    from posttrain_launch.run.prepare_progress import progress_output

    config = complete(absolute(composed.config))
    with progress_output(sys.stderr) as lines:
        prepared = prepare_cached(config, **lines)
    folder = Path(config.output_root) / config.name
    report = write_data_report(config, prepared, folder)
    page = write_data_page(report, folder)
    print(data_text(report, shutil.get_terminal_size((100, 24)).columns, False, conversations=0))
    print(f"{formats_line(report)}\ndata report: {page}")
    return 0


def _evaluate(composed: Composed, _: _Call) -> int:
    from posttrain_dist.evaluation.heldout import evaluate
    from posttrain_dist.prepare import prepare_cached
    from posttrain_dist.report.numbers import loss_of_log
    from posttrain_dist.report.tables import text_table
    from posttrain_launch.run.prepare_progress import progress_output

    config = complete(absolute(composed.config))
    with progress_output(sys.stderr) as lines:
        prepared = prepare_cached(config, only_heldout=True, **lines)
    with contextlib.redirect_stderr(io.StringIO()):  # progress bars of libraries
        found: dict[str, Any] = evaluate(config, prepared)
    losses = [*sorted(found["channels"].items()), ("all channels", found["loss"])]
    rows = [(name, loss_of_log(loss)) for name, loss in losses]
    print(text_table(("channel", "held-out loss"), rows))
    return 0


def _submit(composed: Composed, call: _Call) -> int:
    from posttrain_launch.batch.slurm_job import submit
    from posttrain_launch.run.driver import read_frozen

    folder = freeze(composed, call.typed)
    submit(read_frozen(folder), folder, call.dry_run)
    return 0


ACTIONS: dict[str, Callable[[Composed, _Call], int]] = {
    "train": _train,
    "prepare": _prepare,
    "inspect": _inspect,
    "evaluate": _evaluate,
    "submit": _submit,
}
