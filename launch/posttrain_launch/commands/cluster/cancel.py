"""`posttrain cancel`: end runs so that they save first and do not come back."""

from __future__ import annotations

from posttrain_dist.errors import PosttrainError
from posttrain_launch.commands.arguments import add_root, parser_of
from posttrain_launch.failures import FAILED, print_error
from posttrain_launch.status.find_runs import find_runs
from posttrain_launch.status.stop_run import Way, stop_order, stop_run

GRACE_S = 600.0


def command(arguments: list[str], debug: bool) -> int:
    """Stop each run; the exit code: 0 all are stopped, 1 one could not be."""
    parser = parser_of("cancel")
    parser.add_argument("runs", nargs="+", metavar="RUN|JOB", help="run folders, or ids of jobs")
    add_root(parser)
    parser.add_argument(
        "--now", action="store_true", help="end it at once; what came after its last save is lost"
    )
    parser.add_argument(
        "--grace",
        type=float,
        default=GRACE_S,
        metavar="SECONDS",
        help=f"how long it may take to save and end, before its job is killed; default: "
        f"{GRACE_S:g}",
    )
    given = parser.parse_args(arguments)
    if not 0 <= given.grace < float("inf"):
        parser.error(f"--grace is {given.grace:g}, and must be a number of seconds")
    way = Way(given.now, given.grace, lambda line: print(line, flush=True))
    code = 0
    for run in stop_order(find_runs(given.runs, given.root)):
        try:
            stop_run(run, way)
        except PosttrainError as error:  # the others are still to be stopped
            print_error(error, debug=debug)
            code = int(FAILED)
    return code
