"""`posttrain run`: go on with the run of a run folder, or start a frozen one."""

from __future__ import annotations

import argparse
from pathlib import Path

from posttrain_dist.errors import ConfigError, PosttrainError
from posttrain_launch.commands.arguments import add_run_folder, parser_of
from posttrain_launch.failures import BAD_CONFIG, print_error
from posttrain_launch.run.driver import run_frozen
from posttrain_launch.sweep.folder import is_sweep


def command(arguments: list[str], debug: bool) -> int:
    """Drive the run; the exit code."""
    parser = parser_of("run")
    add_run_folder(parser)
    parser.add_argument(
        "overrides",
        nargs="*",
        default=[],  # else argparse calls them required
        metavar="KEY=VALUE",
        help="train.resume=never starts again; a few others, such as train.steps, optimizer.lr",
    )
    parser.add_argument("--address", help="host:port of a running Ray to use")
    parser.add_argument(
        "--together",
        nargs="+",
        type=Path,
        default=[],
        metavar="RUN",
        help="other LoRA runs of the same base and data: all in one process, over one base",
    )
    # Of the trials of a sweep: their folders were made for this start.
    parser.add_argument("--new", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument(
        "--failed", action="store_true", help="of a sweep: also start its failed trials again"
    )
    given = parser.parse_args(arguments)
    if str(given.run) == "-":  # a job of Ray, which brings its run along as text
        from posttrain_launch.ray.jobs.arrival import arrive

        given.run = arrive()
    if is_sweep(given.run) or given.failed:
        return _run_sweep(given, debug)
    if given.together:
        from posttrain_launch.run.driver_together import run_together

        if given.overrides or given.address:
            parser.error(
                "--together takes no other key or address: the runs are as they are frozen"
            )
        return run_together([given.run, *given.together], debug=debug)
    if not given.overrides:
        return run_frozen(given.run, given.address, debug=debug, new=given.new)
    from posttrain_launch.commands.run import run_overrides

    try:
        values = run_overrides.parse(given.overrides)
    except PosttrainError as error:
        print_error(error, debug=debug)
        return BAD_CONFIG
    return run_frozen(
        given.run,
        given.address,
        debug=debug,
        change=lambda folder, config: run_overrides.applied(folder, config, values),
    )


def _run_sweep(given: argparse.Namespace, debug: bool) -> int:
    """Go on with a sweep; the exit code."""
    from posttrain_launch.sweep.drive import drive_sweep

    try:
        if given.overrides or given.address:
            raise ConfigError(
                "is of a run, and this is the folder of a sweep",
                where="--address" if given.address else given.overrides[0],
                fix=f"leave it out, or give a trial's folder: {given.run}/trial-000",
            )
        return drive_sweep(given.run, failed_too=given.failed, debug=debug)
    except ConfigError as error:
        print_error(error, debug=debug)
        return BAD_CONFIG
