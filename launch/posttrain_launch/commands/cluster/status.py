"""`posttrain status`: where runs stand, from their folders and the queue."""

from __future__ import annotations

import argparse
import contextlib
import shutil
import sys

from posttrain_launch.commands.arguments import add_root, parser_of
from posttrain_launch.status.find_runs import find_runs
from posttrain_launch.status.run_state import Survey, survey
from posttrain_launch.status.status_table import table_json, table_lines, watch

UNLIMITED = 1_000_000  # characters of a line that goes to a file or a pipe


def command(arguments: list[str], debug: bool) -> int:
    """Print the table, or keep it on the terminal; the exit code is 0 whatever runs do."""
    given = _parsed(arguments)

    def look() -> Survey:
        return survey(find_runs(given.runs, given.root))

    if given.json:
        print(table_json(look()))
        return 0
    terminal = sys.stdout.isatty()
    if given.watch and terminal:
        from rich.console import Console

        with contextlib.suppress(KeyboardInterrupt):
            watch(look, Console(markup=False, highlight=False, emoji=False), given.every)
        return 0
    shown = look()
    lines = table_lines(shown, shutil.get_terminal_size().columns if terminal else UNLIMITED)
    for line in lines:
        print(line.plain)
    if failed := [run.run for run in shown.runs if run.state in ("failed", "ended")]:
        folder = next(run.folder for run in shown.runs if run.run == failed[0])
        print(f"\nwhat happened: posttrain logs {folder}")
    return 0


def _parsed(arguments: list[str]) -> argparse.Namespace:
    parser = parser_of("status")
    parser.add_argument(
        "runs",
        nargs="*",
        metavar="RUN|JOB",
        help="run folders, folders of runs, or ids of jobs; without any, the runs below --root "
        "that have a job or are not finished",
    )
    add_root(parser)
    parser.add_argument(
        "--watch", action="store_true", help="keep the table on the terminal until Ctrl-C"
    )
    parser.add_argument(
        "--every", type=float, default=5.0, metavar="SECONDS", help="of --watch; default: 5"
    )
    parser.add_argument("--json", action="store_true", help="as JSON, for programs")
    given = parser.parse_args(arguments)
    if not given.every >= 1:
        parser.error(f"--every is {given.every:g}, and each look asks the cluster: at least 1")
    return given
