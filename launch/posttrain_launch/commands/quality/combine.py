"""`posttrain combine`: several LoRA adapters of one base model as one."""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path

from posttrain_dist.tuning.adapters.combine import Combination
from posttrain_launch.commands.arguments import parser_of

_METHODS = """\
methods:
  linear       the weighted sum of the matrices A, and of the matrices B
  ties         of their largest entries, where most signs agree (arXiv:2306.01708)
  dare_linear  of random entries, scaled up (arXiv:2311.03099)
  dare_ties    of random entries, where most signs agree
  cat          A and B side by side: the exact weighted sum, of the sum of the ranks
"""


def command(arguments: list[str], debug: bool) -> int:
    """Write the combined adapter folder and print its path."""
    parser = parser_of("combine")
    parser.epilog = f"{_METHODS}\n{parser.epilog}"
    parser.add_argument("out", type=Path, metavar="OUT", help="the new adapter folder")
    parser.add_argument(
        "adapters",
        nargs="+",
        type=_weighted,
        metavar="ADAPTER:WEIGHT",
        help="an adapter folder or run, and its weight, such as outputs/polite/...:0.7; a weight "
        "below 0 takes the adapter away",
    )
    parser.add_argument(
        "--method",
        choices=[each.name for each in Combination],
        default=Combination.linear.name,
        help="see below; left out: linear",
    )
    parser.add_argument(
        "--density", type=float, help="share of the entries that ties and dare keep, such as 0.5"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the entries that dare draws")
    given = parser.parse_args(arguments)
    from posttrain_dist.merge import combine_folders

    made = combine_folders(
        given.out.absolute(),
        given.adapters,
        Combination[given.method],
        density=given.density,
        seed=given.seed,
        notice=partial(print, file=sys.stderr),  # standard output is the path alone
    )
    print(made)
    return 0


def _weighted(text: str) -> tuple[Path, float]:
    """`FOLDER:0.7`: a folder's name may hold colons, too."""
    folder, _, weight = text.rpartition(":")
    try:
        return Path(folder).expanduser().absolute(), float(weight)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text} has no weight: write {text}:0.5") from None
