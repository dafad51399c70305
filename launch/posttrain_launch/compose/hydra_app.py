"""What the Hydra verbs share: the command line, its help, one composition, and `-m`.

train, prepare, inspect, evaluate and submit are Hydra applications: they take overrides and Hydra's
flags. Instead of `@hydra.main`, which composes once to find the mode and once more to run, the
configuration is composed here, and Hydra prints or sweeps it.
"""

from __future__ import annotations

import contextlib
import sys
from argparse import Namespace
from collections.abc import Iterator

from hydra._internal.utils import get_args_parser

from posttrain_dist.errors import ConfigError, PosttrainError
from posttrain_launch.cli import VERBS
from posttrain_launch.compose.command_line import CommandLine, read_command_line
from posttrain_launch.compose.composer import Composed, Composer, register_schemas
from posttrain_launch.compose.misused_words import Words
from posttrain_launch.compose.problems import check_sweep, compose_checked
from posttrain_launch.failures import BAD_CONFIG, print_error

__all__ = ["CommandLine", "compose_command", "read_command_line"]

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
FORCE = "  --force             start what cannot fit by its plan\n"
PLAN = """\
  --all               every fallback in one table: whether it fits, tokens/s, GPU-hours
  --largest KEY       the largest value that fits, of data.max_length, train.micro_batch_size or
                      tuning.rank
  --fewest gpus       how many GPUs of this kind it takes
  --json [FILE]       the plan as JSON, on the terminal or in a file
  --html [FILE]       the plan as a page, plan.html where no file is named

what is not typed
  tuning and engine are those that fit first, of full ZeRO-1, 2, 3, 3 with CPU offload, LoRA, QLoRA,
  QLoRA with a paged optimizer; the micro-batch and the layers that recompute their activations are
  the fastest that fit. hardware is what is here; cluster.nodes counts nodes of it. config.json is
  enough of a model; of the data, what `posttrain prepare` found is used, or train.tokens.

exit code
  0 it fits, 1 it does not, 2 wrong input

more examples
  posttrain plan model.path=shape:qwen3-8b hardware=rtx4090 --all
  posttrain plan model.path=/models/M hardware=h100x8 tuning=full --largest data.max_length
  posttrain plan model.path=shape:llama3-70b hardware=h100x8 tuning=full --fewest gpus
"""
MORE = {
    "train": FORCE,
    "submit": "  --dry-run           write the job and submit nothing\n"
    "  --wait              follow the job to its end; the exit code is that of the run\n"
    + FORCE
    + "\nagain\n  posttrain submit RUN_FOLDER sends a run again, which goes on\n",
    "plan": PLAN,
    "inspect": "  --template          show a conversation turn by turn, as it is rendered\n",
    "evaluate": "  --adapter NAME=DIR  an adapter of this model, which gets a column of its own;\n"
    "                      as often as there are adapters\n",
}


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
            words = Words(line.verb, line.misused, [*line.faults, *flag_faults(flags)])
            sweeps = flags.multirun
            if sweeps:
                check_sweep(composer, line.overrides, words)
            else:
                composed = compose_checked(
                    composer,
                    line.overrides,
                    contradictions=not line.shows_only,
                    verb=None if line.shows_only else line.verb,
                    words=words,
                )
                sweeps = composed.sweeps
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


def flag_faults(flags: Namespace) -> list[ConfigError]:
    """Flags that exclude each other, as Hydra has it."""
    found = []
    if flags.resolve and flags.cfg is None and not flags.help:
        found.append(
            ConfigError("prints nothing by itself", where="--resolve", fix="add --cfg job")
        )
    asked = {name: getattr(flags, name) for name in ("run", "cfg", "multirun", "info")}
    asked["shell_completion"] = flags.shell_completion
    given = [f"--{name.replace('_', '-')}" for name, value in asked.items() if value]
    if not flags.help and len(given) > 1:
        what = f"cannot stand beside {', '.join(given[1:])}: each does something else"
        found.append(ConfigError(what, where=given[0], fix="give one of them"))
    return found


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
    """Run what `-m` stands for; the exit code."""
    if line.verb == "train":
        from posttrain_launch.sweep.create import create
        from posttrain_launch.sweep.drive import drive_sweep

        sweep = create(line, composer)
        if sweep is not None:
            return drive_sweep(sweep.folder, resumed=False, debug=line.debug)
    from posttrain_launch.sweep.by_hydra import run_by_hydra

    return run_by_hydra(line, composer)
