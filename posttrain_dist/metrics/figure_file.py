"""figures.json: what an evaluation gives to be drawn, beside its metrics.

{"step": 100, "calibration": {"": [...], "<channel>": [...]}}      "" is all channels
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch

from posttrain_dist import dist
from posttrain_dist.files import write_atomic
from posttrain_dist.flow import Column

FILE = "figures.json"
_log = logging.getLogger(__name__)


class Drawn(Protocol):
    """An objective, as far as its figures are concerned."""

    columns: ClassVar[tuple[Column, ...]]

    def figures(self, sums: Mapping[str, float]) -> dict[str, Any]:
        """See `objectives/base.py`."""


def figure_writer(
    run_folder: Path, channels: list[str], objective: Drawn
) -> Callable[[int, torch.Tensor], None]:
    """What writes the figures of (step, channel table [C, K]); each evaluation replaces the last.

    On rank 0 alone; an objective without figures writes none. What the disk refuses is left out.
    """
    names = [column.name for column in objective.columns]

    def write(step: int, table_CK: torch.Tensor) -> None:
        if dist.rank() != 0:
            return
        rows = {"": table_CK.sum(dim=0), **dict(zip(channels, table_CK, strict=True))}
        found: dict[str, dict[str, Any]] = {}
        for channel, row_K in rows.items():
            sums = dict(zip(names, row_K.tolist(), strict=True))
            for name, value in objective.figures(sums).items():
                found.setdefault(name, {})[channel] = value
        if not found:
            return
        try:
            write_atomic(run_folder / FILE, json.dumps({"step": step, **found}))
        except OSError as error:
            _log.warning("%s is not written: %s", FILE, error)

    return write
