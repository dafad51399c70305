"""`posttrain run`: go on with the run of a run folder, or start a frozen one."""

from __future__ import annotations

from posttrain_launch.commands.arguments import add_run_folder, parser_of
from posttrain_launch.run.driver import run_frozen


def command(arguments: list[str], debug: bool) -> int:
    """Drive the run; the exit code."""
    parser = parser_of("run")
    add_run_folder(parser)
    parser.add_argument("--address", help="host:port of a running Ray to use")
    given = parser.parse_args(arguments)
    return run_frozen(given.run, given.address, debug=debug)
