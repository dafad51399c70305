"""`posttrain logs`: what a run says, the first failing rank's log first."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from posttrain_dist.errors import ConfigError
from posttrain_launch.commands.arguments import add_root, parser_of
from posttrain_launch.ray import remote
from posttrain_launch.status.find_runs import Found, find_runs
from posttrain_launch.status.follow_logs import follow
from posttrain_launch.status.log_parts import Part, last_lines, log_parts
from posttrain_launch.status.ray_jobs import is_elsewhere
from posttrain_launch.status.run_state import survey

LINES = 40
LOOK_S = 10.0  # between two questions to the queue whether the run still lives
LOOK_HERE_S = 1.0  # where only a lock says so


def command(arguments: list[str], debug: bool) -> int:
    """Print the last lines of each log under its path, and what is added to them."""
    given = _parsed(arguments)
    found = find_runs([given.run], given.root)
    if len(found) > 1:
        names = ", ".join(run.name for run in found[:5])
        raise ConfigError(f"has {len(found)} runs", where=given.run, fix=f"name one: {names} …")
    (run,) = found
    if run.folder is None:
        raise ConfigError("has no run folder", where=given.run, fix="give the run folder")
    if run.job is not None and is_elsewhere(run.folder):
        print(f"==> driver: job {run.job.id} on {run.job.address}")
        for piece in remote.tail(run.job, given.follow):
            print(piece if given.follow else _last(piece, given.lines), end="", flush=True)
        return 0
    job = run.job.id if run.job is not None else None
    shown = log_parts(run.folder, given.rank, job)
    for part in shown:
        _print(part, last_lines(part.path, given.lines))
    if given.follow:
        _follow(run, given.rank, shown)
    return 0


def _follow(run: Found, rank: int | None, shown: list[Part]) -> None:
    folder, last = run.folder, shown[-1].path
    assert folder is not None
    parts = {part.path: part for part in shown}
    looked, live = float("-inf"), True

    def paths() -> list[Path]:
        parts.update({part.path: part for part in log_parts(folder, rank)})
        return list(parts)

    def show(path: Path, lines: list[str]) -> None:
        nonlocal last
        if path != last:
            print(_heading(parts[path]))
            last = path
        print("\n".join(lines), flush=True)

    def is_live() -> bool:
        nonlocal looked, live
        if time.monotonic() - looked > (LOOK_HERE_S if run.job is None else LOOK_S):
            looked = time.monotonic()
            seen = survey([run])
            live = bool(seen.notes) or seen.runs[0].state.is_live
        return live

    follow(paths, show, is_live)


def _last(text: str, count: int) -> str:
    return "".join(text.splitlines(keepends=True)[-count:])


def _print(part: Part, lines: list[str]) -> None:
    print(_heading(part))
    print("\n".join(lines) if lines else "(empty)", flush=True)
    print()


def _heading(part: Part) -> str:
    return f"==> {part.why}: {part.path}"


def _parsed(arguments: list[str]) -> argparse.Namespace:
    parser = parser_of("logs")
    parser.add_argument("run", metavar="RUN|JOB", help="a run folder, or the id of a job")
    add_root(parser)
    parser.add_argument("--rank", type=int, metavar="N", help="only the log of this rank")
    parser.add_argument(
        "-f", "--follow", action="store_true", help="and what is added, until the run ends"
    )
    parser.add_argument(
        "-n",
        "--lines",
        type=int,
        default=LINES,
        metavar="N",
        help=f"of each log; default: {LINES}",
    )
    given = parser.parse_args(arguments)
    if given.lines < 1:
        parser.error(f"--lines is {given.lines}, and must be at least 1")
    return given
