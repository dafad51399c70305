"""`posttrain prepare`: tokenise and check the data into the cache, and write its report."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from posttrain_dist.config import complete
from posttrain_launch.compose.hydra_app import compose_command, read_command_line
from posttrain_launch.compose.paths import with_absolute_paths
from posttrain_launch.run.data_report import formats_line, progress_output, write_data_report


def command(arguments: list[str], debug: bool) -> int:
    """Prepare the data; data_report.html goes to `<output_root>/<name>`."""
    composed = compose_command(read_command_line("prepare", arguments, debug))
    from posttrain_dist.prepare import prepare_cached
    from posttrain_dist.report.data_text import data_text

    config = complete(with_absolute_paths(composed.config))
    with progress_output(sys.stderr) as output:
        prepared = prepare_cached(config, **output)
    report, page = write_data_report(config, prepared, Path(config.output_root) / config.name)
    print(data_text(report, shutil.get_terminal_size((100, 24)).columns, False, conversations=0))
    print(f"{formats_line(report)}\ndata report: {page}")
    return 0
