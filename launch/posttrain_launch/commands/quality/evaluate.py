"""`posttrain evaluate`: the held-out loss of a model, for every channel, and of its adapters."""

from __future__ import annotations

import contextlib
import io
import sys
from typing import Any

from posttrain_dist.config import complete
from posttrain_dist.report.data.prepare_progress import progress_output
from posttrain_launch.commands.arguments import named_folders
from posttrain_launch.compose.command_line import ADAPTER
from posttrain_launch.compose.hydra_app import compose_command, read_command_line
from posttrain_launch.compose.paths import with_absolute_paths


def command(arguments: list[str], debug: bool) -> int:
    """Print a table of channels and losses; of adapters, a column for each."""
    line = read_command_line("evaluate", arguments, debug)
    composed = compose_command(line)
    adapters = named_folders(line.own.get(ADAPTER, []))
    from posttrain_dist.evaluation.heldout import evaluate
    from posttrain_dist.prepare import prepare_cached
    from posttrain_dist.report.run.compared import compared_table
    from posttrain_dist.report.text_tables import text_table

    config = complete(with_absolute_paths(composed.config))
    with progress_output(sys.stderr) as output:
        prepared = prepare_cached(config, only_heldout=True, **output)
    notices: list[str] = []
    results: dict[str, dict[str, Any]]
    with contextlib.redirect_stderr(io.StringIO()):  # progress bars of libraries
        if adapters:
            from posttrain_dist.evaluation.adapter_losses import evaluate_adapters

            results = evaluate_adapters(config, prepared, adapters, notices.append)
        else:
            results = {"none": evaluate(config, prepared)}
    for notice in notices:
        print(notice, file=sys.stderr)
    losses = {n: each for n, each in results.items() if each["loss"] is not None}
    print(text_table(*_table("held-out loss", losses, "loss", "channels")))
    for found in results.values():
        if table := compared_table([found["metrics"]] if "metrics" in found else [], "all rows"):
            print(f"\n{table}")
    if scored := {n: each for n, each in results.items() if "channel_accuracy" in each}:
        print()
        print(text_table(*_table("top-1 accuracy", scored, "accuracy", "channel_accuracy")))
    return 0


def _table(
    what: str, results: dict[str, dict[str, Any]], overall: str, by_channel: str
) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Heads and rows: a column for each result, a row for each channel."""
    from posttrain_dist.report.numbers import loss_of_log

    heads = [what] if len(results) == 1 else ["base" if n == "none" else n for n in results]
    first = "channel" if len(results) == 1 else f"channel ({what})"
    channels = sorted({c for result in results.values() for c in result[by_channel]})
    rows = [(c, *(loss_of_log(each[by_channel][c]) for each in results.values())) for c in channels]
    rows.append(("all channels", *(loss_of_log(each[overall]) for each in results.values())))
    return (first, *heads), rows
