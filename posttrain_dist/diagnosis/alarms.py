"""What the diagnosis of a run is told and what it says: config, facts, alarms, their file."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from posttrain_dist.files import write_atomic


@dataclass(kw_only=True, slots=True)
class DiagnoseConfig:
    """The group `diagnose`: when the rules of docs/diagnosis.md raise an alarm.

    A row is one logged training step; losses are in nats a token; shares are fractions.
    """

    off: list[str] = field(default_factory=list)  # rules that are not asked
    early_stop: list[str] = field(
        default_factory=list
    )  # rules whose alarm, above level info, ends the run
    window: int = 30  # rows that a level, a median, is taken over
    quiet_rows: int = 30  # rows without the finding after which it may be raised again
    medium_low: float = 1.0  # expected first loss of 3 to 30 billion parameters, about 2: least
    medium_high: float = 3.0  # ... and most
    large_low: float = 0.75  # the same of 30 billion and more, 1 to 2: least
    large_high: float = 2.5  # ... and most
    random_band: float = 0.1  # share of ln V around ln V that looks like a random head
    rise: float = 0.2  # share of its lowest level by which a loss has risen
    rise_sigmas: float = 6.0  # ... and by how many standard errors of that level
    low_loss: float = 0.2  # a training loss below it is learned by heart
    overfit_evals: int = 3  # evaluations in a row above the best one
    overfit_rise: float = 0.02  # share of the best held-out loss that they are above it
    overfit_least: float = 0.02  # ... and how many nats
    overfit_sigmas: float = 3.0  # ... and how many times the jitter between evaluations
    starved_share: float = 0.01  # a channel below it, or a tenth of an equal share, is starved
    dominating_share: float = 0.9  # a channel above it leaves nothing to the others
    asked_ratio: float = 2.0  # times off the asked share, where the shares are asked for
    spike_rise: float = 0.5  # share of the level that one step is above it
    spike_sigmas: float = 5.0  # ... and how many standard deviations of its logarithm
    stall_rows: int = 100  # rows after warm-up in which a loss should have moved
    stall_fall: float = 0.05  # share of the first loss that training should have fallen
    stall_eval_fall: float = 0.02  # ... and the held-out loss, which has no noise
    special_rows: int = 100  # rows in which a special token should have been learned
    special_loss: float = 0.5  # below it a special token is learned well enough
    special_fall: float = 0.1  # share of its first loss that it should have fallen


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelFacts:
    """What the rules must know of a run beside its numbers; None: not known."""

    parameters: int | None = None
    vocab_size: int | None = None
    random_weights: bool = False  # training from nothing
    token_loss: bool = True  # the loss is a cross-entropy of tokens
    # From a step on: channel -> asked share of the weight; empty: the data is taken as it is.
    # At each of these steps the mixture changes, even where the shares by channel stay.
    asked_shares: dict[int, dict[str, float]] = field(default_factory=dict)

    def asked_at(self, step: int) -> dict[str, float]:
        """Channel -> share of what is asked for at `step`."""
        begun = max((first for first in self.asked_shares if first <= step), default=0)
        return self.asked_shares.get(begun, {})


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
    """`logs/alarms.jsonl`: one object an alarm. A resumed run drops those after its step.

    The file is there from the start, so that an empty one means that no rule found anything.
    """

    def __init__(self, path: Path, start_step: int) -> None:
        kept = [row for row in read_alarms(path) if row["step"] <= start_step] if start_step else []
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, "".join(json.dumps(row) + "\n" for row in kept))
        self._file = path.open("a", encoding="utf-8")

    def write(self, alarms: list[Alarm]) -> None:
        """Take in the alarms of one step."""
        for alarm in alarms:
            self._file.write(json.dumps(alarm.row()) + "\n")
        if alarms:
            self._file.flush()

    def close(self) -> None:
        """Close the file; nothing is written after."""
        self._file.close()


def read_alarms(path: Path) -> list[dict[str, Any]]:
    """The whole lines of an alarms.jsonl; what is torn is passed over."""
    rows = []
    if not path.is_file():
        return []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int) and "rule" in row:
            rows.append(row)
    return rows
