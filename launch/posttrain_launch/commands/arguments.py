"""The argument parser of the verbs that are no Hydra applications."""

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


def add_run_folder(parser: argparse.ArgumentParser) -> None:
    """Let the verb take the folder of a run."""
    parser.add_argument("run", type=Path, metavar="RUN", help="a folder outputs/<name>/<time>")
