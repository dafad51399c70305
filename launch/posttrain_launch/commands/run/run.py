"""`posttrain run`: go on with the run of a run folder, or start a frozen one."""

from __future__ import annotations

import argparse

from posttrain_launch.commands.arguments import add_run_folder, parser_of
from posttrain_launch.run.driver import run_frozen


def command(arguments: list[str], debug: bool) -> int:
    """Drive the run; the exit code."""
    parser = parser_of("run")
    add_run_folder(parser)
    parser.add_argument("--address", help="host:port of a running Ray to use")
    # Of the trials of a sweep: their folders were made for this start.
    parser.add_argument("--new", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    return run_frozen(given.run, given.address, debug=debug, new=given.new)
