"""`posttrain train`: make a run folder of what was typed, and drive the run to its end."""

from __future__ import annotations

from posttrain_launch.compose.hydra_app import compose_command, read_command_line
from posttrain_launch.run.driver import run_frozen
from posttrain_launch.run.freeze import freeze


def command(arguments: list[str], debug: bool) -> int:
    """Train; the exit code."""
    line = read_command_line("train", arguments, debug)
    folder = freeze(compose_command(line), line.typed, force=line.force)
    return run_frozen(folder, debug=debug, new=True)
