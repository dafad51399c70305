"""The verbs that take a run folder: run, export, report."""

from __future__ import annotations

import argparse
from pathlib import Path

from posttrain_launch.cli import VERBS


def parser_of(verb: str) -> argparse.ArgumentParser:
    """An argument parser whose help shows the verb's example."""
    row = VERBS[verb]
    parser = argparse.ArgumentParser(
        prog=f"posttrain {verb}",
        description=row.what,
        epilog=f"example:\n  {row.example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--debug", action="store_true", help="the stack trace of an error")
    return parser


def command(verb: str, words: list[str], debug: bool) -> int:
    """Run the verb; the exit code."""
    parser = parser_of(verb)
    parser.add_argument("run", type=Path, metavar="RUN", help="a folder outputs/<name>/<time>")
    if verb == "run":
        parser.add_argument("--address", help="host:port of a running Ray to use")
    if verb == "export":
        parser.add_argument(
            "out", type=Path, nargs="?", metavar="OUT", help="the new folder; left out: RUN/export"
        )
        parser.add_argument("--step", type=int, help="of a checkpoint; left out: the newest")
        parser.add_argument(
            "--dtype", choices=("bfloat16", "float32"), help="left out: what the run trained in"
        )
    arguments = parser.parse_args(words)
    if verb == "run":
        from posttrain_launch.run.driver import run_frozen

        return run_frozen(arguments.run, arguments.address, debug=debug)
    if verb == "export":
        from posttrain_dist.export import export_checkpoint

        print(
            export_checkpoint(
                arguments.run.absolute(), arguments.out, arguments.step, arguments.dtype
            )
        )
        return 0
    from posttrain_dist.report import write_report

    print(write_report(arguments.run.absolute()))
    return 0
