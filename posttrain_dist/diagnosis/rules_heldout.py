"""Rules over held-out rows: overfitting of the run and of each channel. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Iterator
from statistics import median

from posttrain_dist.diagnosis import DiagnoseConfig
from posttrain_dist.diagnosis.alarms import Alarm, Level, go_back
from posttrain_dist.diagnosis.facts import ModelFacts
from posttrain_dist.diagnosis.history import (
    HELD_OUT,
    HELD_OUT_CHANNEL,
    MAD_TO_SIGMA,
    History,
)

OVERFIT_RISE = 0.02  # share of the best held-out loss that the last evaluations are above it
OVERFIT_NATS = 0.02  # ... and how many nats
OVERFIT_SIGMAS = 3.0  # ... and how many times the jitter between evaluations
# Standard deviation of x[i - 1] - 2 x[i] + x[i + 1] for independent x of deviation 1.
SECOND_DIFFERENCE = math.sqrt(6)


def overfitting(history: History, config: DiagnoseConfig, facts: ModelFacts) -> Iterator[Alarm]:
    """Over all channels: the training loss falls while the held-out loss rises."""
    yield from _overfitting("overfitting", HELD_OUT, "", history, config)


def channel_overfitting(
    history: History, config: DiagnoseConfig, facts: ModelFacts
) -> Iterator[Alarm]:
    """The same of each channel; a single channel is what `overfitting` evaluates already."""
    if len(history.channels) > 1:
        for name in history.channels:
            key = HELD_OUT_CHANNEL + name
            yield from _overfitting("channel_overfitting", key, name, history, config)


def _overfitting(
    rule: str, key: str, subject: str, history: History, config: DiagnoseConfig
) -> Iterator[Alarm]:
    best = history.best.get(key)
    points = [e for e in history.evaluations if key in e.held_out]
    count = config.overfit_evals
    if best is None or best.training is None or len(points) <= count:
        return
    late = points[-count:]
    if late[0].step <= best.step or any(key not in e.training for e in late):
        return
    values = [e.held_out[key] for e in points if e.step >= best.step]
    level = median(values[-count:])
    jitter = OVERFIT_SIGMAS * _jitter(values)
    least = max(OVERFIT_RISE * best.value, OVERFIT_NATS, jitter)
    trained = median(e.training[key] for e in late)
    # Going back to near the best once means that it has not risen.
    risen = level - best.value > least and min(values[-count:]) > best.value + least / 2
    if not risen or trained >= (1 - OVERFIT_RISE) * best.training:
        return
    of = f"of channel {subject} " if subject else ""
    less = "give the channel a smaller share or more rows" if subject else "train for fewer epochs"
    yield Alarm(
        rule,
        history.last["step"],
        Level.warning,
        f"the held-out loss {of}rose from {best.value:.3g} at step {best.step} to {level:.3g} in "
        f"the last {count} evaluations, while its training loss fell from {best.training:.3g} to "
        f"{trained:.3g}: the rows are memorised",
        f"{go_back(best.step)}, or {less}, or lower optimizer.lr",
        subject,
    )


def _jitter(values: list[float]) -> float:
    """Standard deviation of an evaluation about a smooth curve; 0 where there are too few."""
    bends = [abs(a - 2 * b + c) for a, b, c in zip(values, values[1:], values[2:], strict=False)]
    return MAD_TO_SIGMA * median(bends) / SECOND_DIFFERENCE if bends else 0.0
