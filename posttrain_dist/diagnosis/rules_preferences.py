"""Rules over the answers that a preference is trained towards. Pure functions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import median

from posttrain_dist.diagnosis import DiagnoseConfig
from posttrain_dist.diagnosis.alarms import Alarm, Level, go_back
from posttrain_dist.diagnosis.facts import ModelFacts
from posttrain_dist.diagnosis.history import LOSS, PREFERRED, History, Row, number, preferred_value

CHOSEN_FALL = 0.1  # nats per token by which the preferred answers became less likely
FALLEN_ROWS = 0.9  # share of the window's rows that are that far below the start
FIRST_VALUES = 5  # values that the start is taken over


def falling_chosen(history: History, config: DiagnoseConfig, facts: ModelFacts) -> Iterator[Alarm]:
    """The log-probability of the preferred answers lies far below its start for a whole window.

    A margin grows as well when both answers become less likely and the worse one faster. Where
    there is a reference the fall is measured against it, on the same rows, so that longer or harder
    ones are no fall.
    """
    start = history.start(PREFERRED)[:FIRST_VALUES]
    rows = history.recent()
    values = [value for row in rows if (value := preferred_value(row)) is not None]
    if not history.from_first_step or len(start) < FIRST_VALUES or len(values) < history.window:
        return
    if history.num_mixture_rows < history.num_rows and not _referenced(rows):
        return  # the rows are others than those of the start
    then, level = median(start), median(values)
    fallen = sum(value < then - CHOSEN_FALL for value in values)
    newest = median(values[-max(3, len(values) // 3) :])
    if fallen < FALLEN_ROWS * len(values) or newest >= then - CHOSEN_FALL:
        return
    loss = number(history.last, LOSS)
    beside = f" while the loss is {loss:.3g}" if loss is not None else ""
    yield Alarm(
        "falling_chosen",
        history.last["step"],
        Level.warning,
        f"the preferred answers are {then - level:.2g} nats per token less likely than at the "
        f"start, over the last {config.window} logged steps{beside}: the margin grows because the "
        "other answers fall faster, and the model unlearns what it should say",
        "set objective.sft_weight=1.0, which keeps them likely, or lower optimizer.lr 3 times, or "
        f"raise objective.beta; {go_back(history.first_row['step'])} or train for fewer steps",
    )


def _referenced(rows: Sequence[Row]) -> bool:
    return any(key.endswith("_logratio") for row in rows for key in row)
