"""The argument parser of the verbs that are no Hydra applications."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import NoReturn

from posttrain_dist import __version__
from posttrain_dist.errors import ConfigError
from posttrain_launch.cli import VERBS
from posttrain_launch.failures import BAD_CONFIG


class _Parser(argparse.ArgumentParser):
    """Words its errors as every other one."""

    def error(self, message: str) -> NoReturn:
        example = (self.epilog or "").rpartition("\n")[2].strip()
        text = f"error: {self.prog}: {message}\n  fix: {example}; {self.prog} --help says more"
        print(text, file=sys.stderr)
        raise SystemExit(BAD_CONFIG)


def parser_of(verb: str) -> argparse.ArgumentParser:
    """An argument parser whose help shows the verb's example."""
    row = VERBS[verb]
    parser = _Parser(
        prog=f"posttrain {verb}",
        description=row.what,
        epilog=f"example:\n  {row.example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"posttrain {__version__}")
    parser.add_argument("--debug", action="store_true", help="the stack trace of an error")
    return parser


def add_run_folder(parser: argparse.ArgumentParser) -> None:
    """Let the verb take the folder of a run."""
    parser.add_argument("run", type=Path, metavar="RUN", help="a folder outputs/<name>/<time>")


def add_root(parser: argparse.ArgumentParser) -> None:
    """Let the verb take the folder that runs are below."""
    parser.add_argument(
        "--root",
        type=Path,
        default=Path("outputs"),
        metavar="FOLDER",
        help="output_root of the runs; default: outputs",
    )


def add_adapters(parser: argparse.ArgumentParser, what: str) -> None:
    """Let the verb take adapters by name.

    Args:
        what: of the sentence "an adapter ...", for --help.
    """
    parser.add_argument(
        "--adapter",
        action="append",
        default=[],
        metavar="NAME=FOLDER",
        help=f"an adapter of this base model {what}; as often as there are adapters",
    )


def named_folders(given: list[str]) -> dict[str, Path]:
    """The folders of `--adapter NAME=FOLDER`, which may be given several times.

    Raises:
        ConfigError: one is not of this form, or two have one name.
    """
    found: dict[str, Path] = {}
    for text in given:
        name, equals, folder = text.partition("=")
        fix = "write --adapter NAME=FOLDER, for instance --adapter polite=outputs/polite/..."
        if not (name and equals and folder):
            raise ConfigError(f"{text!r} is not of the form", where="--adapter", fix=fix)
        if name in found:
            what = f"{name} is given twice"
            raise ConfigError(what, where="--adapter", fix="give each adapter a name of its own")
        found[name] = Path(folder).expanduser().absolute()
    return found
