"""`posttrain prepare`: tokenise and check the data into the cache, and write its report."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from posttrain_dist.config import complete
from posttrain_dist.report.data.prepare_progress import progress_output
from posttrain_launch.compose.hydra_app import compose_command, read_command_line
from posttrain_launch.compose.paths import with_absolute_paths


def command(arguments: list[str], debug: bool) -> int:
    """Prepare the data; data_report.html goes to `<output_root>/<name>`."""
    composed = compose_command(read_command_line("prepare", arguments, debug))
    from posttrain_dist.prepare import prepare_cached
    from posttrain_dist.prepare.data_report import write_data_report
    from posttrain_dist.report.data.data_page import write_data_page
    from posttrain_dist.report.data.data_text import data_text, formats_line

    config = complete(with_absolute_paths(composed.config))
    with progress_output(sys.stderr) as output:
        prepared = prepare_cached(config, **output)
    folder = Path(config.output_root) / config.name
    report = write_data_report(config, prepared, folder)
    page = write_data_page(report, folder)
    print(data_text(report, shutil.get_terminal_size((100, 24)).columns, False, conversations=0))
    print(f"{formats_line(report)}\ndata report: {page}")
    return 0
