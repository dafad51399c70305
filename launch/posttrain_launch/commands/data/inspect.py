"""`posttrain inspect`: what would be trained on, on the terminal."""

from __future__ import annotations

import os
import shutil
import sys
from dataclasses import replace

from posttrain_dist.config import complete
from posttrain_dist.errors import PosttrainError
from posttrain_dist.report.data.prepare_progress import progress_output
from posttrain_launch.compose.hydra_app import compose_command, read_command_line
from posttrain_launch.compose.paths import with_absolute_paths


def command(arguments: list[str], debug: bool) -> int:
    """Print rows, supervised tokens and a packed batch, also of rows that the checks refuse."""
    line = read_command_line("inspect", arguments, debug)
    composed = compose_command(line)
    if "--template" in line.own:
        from posttrain_launch.commands.data.template_view import print_template

        print_template(complete(with_absolute_paths(composed.config)))
        return 0
    from posttrain_dist.prepare import prepare_cached
    from posttrain_dist.prepare.data_report import data_report
    from posttrain_dist.report.data.data_text import data_text, formats_line

    config = complete(with_absolute_paths(composed.config))
    refusal: PosttrainError | None = None
    with progress_output(sys.stderr) as output:
        try:
            prepared = prepare_cached(config, **output)
        except PosttrainError as error:
            if not config.template.strict:
                raise
            # What the checks refuse is shown all the same, and then why it is refused.
            config = replace(config, template=replace(config.template, strict=False))
            prepared, refusal = prepare_cached(config, **output), error
    report = data_report(config, prepared)
    color = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    width = shutil.get_terminal_size((100, 24)).columns
    print(data_text(report, width, color, conversations=1))
    print(formats_line(report))
    if refusal is not None:
        raise refusal
    return 0
