"""`posttrain report`: the page of a run, finished or not."""

from __future__ import annotations

from posttrain_launch.commands.arguments import add_run_folder, parser_of


def command(arguments: list[str], debug: bool) -> int:
    """Write report.html and print its path."""
    parser = parser_of("report")
    add_run_folder(parser)
    given = parser.parse_args(arguments)
    from posttrain_dist.report import write_report

    print(write_report(given.run.absolute()))
    return 0
