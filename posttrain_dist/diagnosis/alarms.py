"""What a rule finds: an alarm, its metric, and the file that alarms are logged to."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from posttrain_dist.errors import unwritable
from posttrain_dist.files import LineFile, read_rows


class Level(Enum):
    """How bad an alarm is."""

    info = "info"  # worth a look
    warning = "warning"  # the result is probably worse than it could be
    error = "error"  # the run is probably lost


@dataclass(frozen=True, slots=True)
class Alarm:
    """One finding of one rule."""

    rule: str
    step: int
    level: Level
    message: str  # what is seen, with its numbers, and what it means
    fix: str  # what to do
    subject: str = ""  # the channels or tokens that it is about; empty: the run

    def line(self) -> str:
        """`step 120: warning: rising_loss: ...`, with the fix on a second line."""
        about = f"{self.rule} ({self.subject})" if self.subject else self.rule
        first = f"step {self.step}: {self.level.name}: {about}: {self.message}"
        return f"{first}\n  fix: {self.fix}"

    def row(self) -> dict[str, Any]:
        """The object written to alarms.jsonl."""
        return {**dataclasses.asdict(self), "level": self.level.name}


def go_back(step: int) -> str:
    """Advice to go on from a step; which checkpoints there are is not known to the rules."""
    return (
        f"go back to the checkpoint at or before step {step} (train.save_every and "
        "checkpoint.keep decide which there are)"
    )


def alarm_metrics(alarms: list[Alarm]) -> dict[str, float]:
    """`alarm/<rule>`: 1.0 at the step of an alarm; other steps have no such metric."""
    return {f"alarm/{alarm.rule}": 1.0 for alarm in alarms}


class AlarmLog:
    """`logs/alarms.jsonl`: one object per alarm. A resumed run drops those after its step.

    The file is there from the start, so that an empty one means that no rule found anything. An
    alarm that the disk refuses is kept and written later; it does not stop the training.

    Raises:
        PosttrainError: the file cannot be written.
    """

    def __init__(self, path: Path, start_step: int) -> None:
        kept = [row for row in read_alarms(path) if row["step"] <= start_step] if start_step else []
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = LineFile(path, map(json.dumps, kept))
        except OSError as error:
            raise unwritable(path, error) from error

    def write(self, alarms: list[Alarm]) -> None:
        """Take in the alarms of one step."""
        for alarm in alarms:
            self._file.append(json.dumps(alarm.row()))

    def close(self) -> None:
        """Close the file; nothing is written after.

        Raises:
            PosttrainError: the disk still refuses an alarm.
        """
        try:
            self._file.close()
        except OSError as error:
            raise unwritable(self._file.path, error) from error


def read_alarms(path: Path) -> list[dict[str, Any]]:
    """The complete lines of an alarms.jsonl; a torn one is skipped."""
    return [row for row in read_rows(path) if "rule" in row]
