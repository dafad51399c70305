"""What the Hydra verbs share: the command line, its help, one composition, and `-m`.

train, prepare, inspect, evaluate and submit are Hydra applications: they take overrides and Hydra's
flags. Instead of `@hydra.main`, which composes once to find the mode and once more to run, the
configuration is composed here, and Hydra prints or sweeps it.
"""

from __future__ import annotations

import contextlib
import shlex
import sys
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from posttrain_dist.errors import ConfigError, PosttrainError
from posttrain_dist.preflight import check_inputs
from posttrain_launch.cli import VERBS
from posttrain_launch.compose.composer import Composed, Composer, register_schemas
from posttrain_launch.compose.paths import with_absolute_paths
from posttrain_launch.compose.problems import check_sweep, compose_checked
from posttrain_launch.failures import BAD_CONFIG, STOPPED, print_error
from posttrain_launch.run.freeze import freeze
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


@dataclass(frozen=True, slots=True)
class CommandLine:
    """What was typed, taken apart."""

    verb: str
    arguments: list[str]  # overrides and flags, as given to Hydra
    flags: Namespace  # Hydra's
    overrides: list[str]
    debug: bool
    dry_run: bool

    @property
    def typed(self) -> str:
        """The command line, for the run's lineage."""
        return shlex.join(["posttrain", self.verb, *self.arguments])

    @property
    def shows_only(self) -> bool:
        """Whether a flag asks Hydra to print something and leave."""
        f = self.flags
        return bool(f.help or f.hydra_help or f.cfg or f.info or f.shell_completion)


def read_command_line(verb: str, arguments: list[str], debug: bool) -> CommandLine:
    """Take apart what stands after the verb.

    Raises:
        SystemExit: it is none of Hydra's flags.
    """
    dry_run = verb == "submit" and "--dry-run" in arguments
    arguments = [a for a in arguments if not (dry_run and a == "--dry-run")]
    # An experiment is no group with a default, so Hydra wants a plus; nobody need know.
    arguments = [f"+{a}" if a.startswith("experiment=") else a for a in arguments]
    with _program_name(verb):
        flags = get_args_parser().parse_args(arguments)
    added = []
    shows_page = flags.help or flags.hydra_help or flags.shell_completion
    if verb == "train" and not flags.overrides and not shows_page:
        added.append("+experiment=demo")
        print("no arguments: running the demo (+experiment=demo)", file=sys.stderr)
    if verb == "submit" and not any(o.startswith("cluster=") for o in flags.overrides):
        added.append("cluster=slurm")
    flags.overrides += added
    return CommandLine(verb, [*arguments, *added], flags, flags.overrides, debug, dry_run)


def compose_command(line: CommandLine) -> Composed:
    """The configuration of a command line, checked for its verb.

    Raises:
        SystemExit: there is nothing left to do: what is wrong was printed (exit code 2), or what a
            flag asks for (0), or the runs of `-m` have ended (0, 1 or 130).
    """
    flags = line.flags
    try:
        composer = Composer(flags.config_dir, flags.config_path, flags.config_name)
        with _program_name(line.verb), composer:
            if flags.experimental_rerun is not None:
                raise ConfigError(
                    "is not supported",
                    where="--experimental-rerun",
                    fix="`posttrain run <run folder>` goes on with a frozen run",
                )
            if flags.hydra_help or flags.shell_completion:
                _print_asked(line, composer)
                raise SystemExit(0)
            if flags.help:
                register_schemas(_help_page(line.verb, composer))
            sweeps = flags.multirun
            if sweeps:
                check_sweep(composer, line.overrides)
            else:
                composed = compose_checked(
                    composer,
                    line.overrides,
                    contradictions=not line.shows_only,
                    verb=None if line.shows_only else line.verb,
                )
                sweeps = composed.sweeps
            _check_flags(flags)
            if line.shows_only:
                _print_asked(line, composer)
                raise SystemExit(0)
            if sweeps:
                raise SystemExit(_run_sweep(line, composer))
            return composed
    except PosttrainError as error:
        print_error(error, debug=line.debug)
        raise SystemExit(BAD_CONFIG) from error


@contextlib.contextmanager
def _program_name(verb: str) -> Iterator[None]:
    """Have Hydra's pages call the program by the name that was typed."""
    before, sys.argv = sys.argv, [f"posttrain {verb}"]
    try:
        yield
    finally:
        sys.argv = before


# ------------------------------------------------------------------------ what only prints


def _check_flags(flags: Namespace) -> None:
    """Refuse flags that exclude each other, as Hydra does."""
    if flags.resolve and flags.cfg is None and not flags.help:
        raise ValueError("The --resolve flag can only be used in conjunction with --cfg or --help")
    asked = (flags.run, flags.cfg, flags.multirun, flags.shell_completion, flags.info)
    if not flags.help and sum(map(bool, asked)) > 1:
        raise ValueError(
            "Only one of --run, --multirun, --cfg, --info and --shell_completion can be specified"
        )


def _print_asked(line: CommandLine, composer: Composer) -> None:
    """Print what a flag of Hydra asks for."""
    flags, hydra, name = line.flags, composer.hydra, composer.config_name
    if flags.help:
        hydra.app_help(config_name=name, args_parser=get_args_parser(), args=flags)
    elif flags.hydra_help:
        hydra.hydra_help(config_name=name, args_parser=get_args_parser(), args=flags)
    elif flags.cfg:
        hydra.show_cfg(name, line.overrides, flags.cfg, flags.package, flags.resolve)
    elif flags.shell_completion:
        hydra.shell_completion(config_name=name, overrides=line.overrides)
    else:
        hydra.show_info(flags.info, config_name=name, overrides=line.overrides)


def _help_page(verb: str, composer: Composer) -> str:
    rows = {group: ", ".join(composer.options(group)) for group in composer.groups()}
    width = max(map(len, rows))
    row = VERBS[verb]
    return HELP.format(
        verb=verb,
        what=row.what,
        example=row.example,
        groups="\n".join(f"  {group:<{width}}  {options}" for group, options in rows.items()),
        more=MORE.get(verb, ""),
    )


# ------------------------------------------------------------------------------ many runs


def _run_sweep(line: CommandLine, composer: Composer) -> int:
    """Have Hydra run the trials, and print their table; the exit code."""
    sweep = Sweep()

    def run_one(config: DictConfig) -> float | None:
        hydra = HydraConfig.get()
        return sweep.trial(config, hydra, lambda composed: _run_trial(line, composed, sweep))  # type: ignore[arg-type]

    try:
        overrides = [*line.overrides, "hydra.mode=MULTIRUN"]
        composer.hydra.multirun(composer.config_name, run_one, overrides)
    except KeyboardInterrupt:
        if sweep.trials:
            print(sweep.table())
        return STOPPED
    print(sweep.table())
    return sweep.exit_code()


def _run_trial(line: CommandLine, composed: Composed, sweep: Sweep) -> tuple[int, Path | None]:
    if line.verb == "train":
        check_inputs(with_absolute_paths(composed.config))
        folder = freeze(composed, line.typed)
        return sweep.run_subprocess(["run", str(folder)], line.debug), folder
    arguments = [line.verb, *composed.overrides]
    if line.flags.config_dir is not None:
        arguments += ["--config-dir", line.flags.config_dir]
    if line.dry_run:
        arguments.append("--dry-run")
    return sweep.run_subprocess(arguments, line.debug), None
