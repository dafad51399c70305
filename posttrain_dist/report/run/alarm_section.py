"""The section of a report that shows what the diagnosis of the run found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from posttrain_dist.diagnosis.alarms import read_alarms

MAX_ALARMS = 100  # rows of the table; the file has them all


def alarms_of(folder: Path) -> dict[str, Any] | None:
    """The alarms of a run folder for the page, in order of their step; None: none were looked for.

    Returns:
        rows: step, level, tone (of the level: bad, warn, or empty), rule, subject, message, fix.
        counts: level -> number of alarms, worst first, without zeros.
        hidden: alarms beyond the table's length.
    """
    path = folder / "logs" / "alarms.jsonl"
    if not path.is_file():
        return None
    found = sorted(read_alarms(path), key=lambda row: int(row["step"]))
    levels = [str(row.get("level")) for row in found]
    order = ("error", "warning", "info")
    return {
        "rows": [_alarm_row(row) for row in found[:MAX_ALARMS]],
        "counts": {level: levels.count(level) for level in order if level in levels},
        "hidden": max(0, len(found) - MAX_ALARMS),
    }


def _alarm_row(row: dict[str, Any]) -> dict[str, str]:
    level = str(row.get("level") or "")
    return {
        "step": f"{row['step']:,}",
        "level": level,
        "tone": {"error": "bad", "warning": "warn"}.get(level, ""),
        **{key: str(row.get(key) or "") for key in ("rule", "subject", "message", "fix")},
    }
