"""`posttrain report`: the page of a run, or the table of a sweep; finished or not."""

from __future__ import annotations

from posttrain_dist.errors import ConfigError
from posttrain_launch.commands.arguments import add_run_folder, parser_of
from posttrain_launch.run.driver import read_frozen
from posttrain_launch.sweep.folder import PAGE, is_sweep, read_sweep


def command(arguments: list[str], debug: bool) -> int:
    """Write report.html and print its path; of a sweep, print the table too."""
    parser = parser_of("report")
    add_run_folder(parser)
    parser.add_argument(
        "--metric",
        metavar="KEY",
        help="of a sweep: sort by this key of metrics.jsonl, such as eval_channel_loss/<channel>",
    )
    given = parser.parse_args(arguments)
    if is_sweep(given.run):
        from posttrain_dist.report.sweep import write_sweep_page
        from posttrain_launch.sweep.results import read_results
        from posttrain_launch.sweep.table import results_text

        results = read_results(read_sweep(given.run), given.metric)
        print(results_text(results))
        print(f"\n{write_sweep_page(given.run.absolute() / PAGE, results)}")
        return 0
    if given.metric is not None:
        raise ConfigError(
            "sorts the trials of a sweep, and this is none",
            where="--metric",
            fix="give the folder of a sweep, outputs/<name>/sweeps/<time>",
        )
    from posttrain_dist.report import write_report

    read_frozen(given.run)  # or it is no run folder
    print(write_report(given.run.absolute()))
    return 0
