"""`posttrain evaluate`: the held-out loss of a model, for every channel."""

from __future__ import annotations

import contextlib
import io
import sys
from typing import Any

from posttrain_dist.config import complete
from posttrain_dist.report.data.prepare_progress import progress_output
from posttrain_launch.compose.hydra_app import compose_command, read_command_line
from posttrain_launch.compose.paths import with_absolute_paths


def command(arguments: list[str], debug: bool) -> int:
    """Print a table of channels and losses."""
    composed = compose_command(read_command_line("evaluate", arguments, debug))
    from posttrain_dist.evaluation.heldout import evaluate
    from posttrain_dist.prepare import prepare_cached
    from posttrain_dist.report.numbers import loss_of_log
    from posttrain_dist.report.text_tables import text_table

    config = complete(with_absolute_paths(composed.config))
    with progress_output(sys.stderr) as output:
        prepared = prepare_cached(config, only_heldout=True, **output)
    with contextlib.redirect_stderr(io.StringIO()):  # progress bars of libraries
        found: dict[str, Any] = evaluate(config, prepared)
    losses = [*sorted(found["channels"].items()), ("all channels", found["loss"])]
    rows = [(name, loss_of_log(loss)) for name, loss in losses]
    print(text_table(("channel", "held-out loss"), rows))
    return 0
