"""`posttrain export`: a checkpoint of a run as a Hugging Face folder, or as an adapter folder."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

from posttrain_launch.commands.arguments import add_run_folder, parser_of


def command(arguments: list[str], debug: bool) -> int:
    """Write the folder and print its path."""
    parser = parser_of("export")
    add_run_folder(parser)
    parser.add_argument(
        "out",
        type=Path,
        nargs="?",
        metavar="OUT",
        help="the new folder; left out: RUN/export, or RUN/adapter of a run that trained one",
    )
    parser.add_argument("--step", type=int, help="of a checkpoint; left out: the newest")
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float32"), help="left out: what the run trained in"
    )
    parser.add_argument(
        "--plain",
        action="store_true",
        help="an rsLoRA or PiSSA adapter as plain LoRA that equals it, which every engine loads",
    )
    parser.add_argument(
        "--merge",
        action="store_true",
        help="the base model with the run's adapter in its weights: a model that needs no adapter",
    )
    given = parser.parse_args(arguments)
    notice = partial(print, file=sys.stderr)  # standard output is the path alone
    if given.merge:
        if given.plain:
            parser.error("--plain and --merge exclude each other")
        from posttrain_dist.merge import merge_checkpoint

        print(merge_checkpoint(given.run.absolute(), given.out, given.step, given.dtype, notice))
        return 0
    from posttrain_dist.export import export_checkpoint

    print(
        export_checkpoint(
            given.run.absolute(), given.out, given.step, given.dtype, notice, plain=given.plain
        )
    )
    return 0
