"""`posttrain run`: go on with the run of a run folder, or start a frozen one."""

from __future__ import annotations

import argparse

from posttrain_dist.errors import PosttrainError
from posttrain_launch.commands.arguments import add_run_folder, parser_of
from posttrain_launch.failures import BAD_CONFIG, print_error
from posttrain_launch.run.driver import run_frozen


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
    # Of the trials of a sweep: their folders were made for this start.
    parser.add_argument("--new", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if str(given.run) == "-":  # a job of Ray, which brings its run along as text
        from posttrain_launch.ray.jobs.arrival import arrive

        given.run = arrive()
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
