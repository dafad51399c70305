"""A run in this process: no Ray, one worker."""

from __future__ import annotations

import contextlib
from pathlib import Path

from posttrain_dist.config import RunConfig


def run(config: RunConfig, run_folder: Path) -> None:
    """Train here; what libraries print goes to logs/rank-0.log.

    Raises:
        PosttrainError: config, data, model or checkpoint cannot be used.
    """
    # Left open: handlers that libraries bind to it live on after the run.
    out = (run_folder / "logs" / "rank-0.log").open("a", buffering=1, encoding="utf-8")
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        from posttrain_dist.dist import Process
        from posttrain_dist.train import train

        train(config, run_folder, Process())
