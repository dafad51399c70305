"""Rules over channels' shares of the weight and over special tokens. Pure functions."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import fmean, median

from posttrain_dist.diagnosis import DiagnoseConfig
from posttrain_dist.diagnosis.alarms import Alarm, Level
from posttrain_dist.diagnosis.facts import ModelFacts
from posttrain_dist.diagnosis.history import (
    LOSS,
    SHARE,
    SPECIAL,
    History,
    column,
    mean_error,
    number,
)

EQUAL_PART = 0.1  # part of an equal share below which a channel of many is starved
DOMINATING_SHARE = 0.9  # a channel above it leaves nothing to the others
TARGET_RATIO = 2.0  # times off the target share, where there is one
TIMES_SEEN = 10  # times that a channel should be drawn in a window before its share is judged


def starved_channel(history: History, config: DiagnoseConfig, facts: ModelFacts) -> Iterator[Alarm]:
    """A channel that has hardly any weight, or far less than its target."""
    equal = 1 / max(1, len(history.channels))
    common = min(config.starved_share, EQUAL_PART * equal)
    for name, share, error, target in _shares(history, facts):
        least = common if target is None else target / TARGET_RATIO
        due = equal if target is None else target
        if share + 2 * error < least and not _by_chance(due, history):
            aim = "" if target is None else f", its target is {target:.1%}"
            yield Alarm(
                "starved_channel",
                history.last["step"],
                Level.warning,
                f"channel {name} has {share:.2%} of the weight in the last {history.window} logged "
                f"steps{aim}: it is hardly trained, its losses are mostly noise",
                "give it more weight in data.sources or more rows, or leave it out",
                name,
            )


def dominating_channel(
    history: History, config: DiagnoseConfig, facts: ModelFacts
) -> Iterator[Alarm]:
    """A channel that leaves nothing to the others, or has far more than its target."""
    for name, share, error, target in _shares(history, facts):
        most = DOMINATING_SHARE if target is None else target * TARGET_RATIO
        if share - 2 * error > most and (target is None or not _by_chance(target, history)):
            aim = "" if target is None else f", its target is {target:.1%}"
            yield Alarm(
                "dominating_channel",
                history.last["step"],
                Level.warning,
                f"channel {name} has {share:.1%} of the weight in the last {history.window} logged "
                f"steps{aim}: train/loss shows this channel alone, the others change little",
                "give the others more weight in data.sources, or data.mix_by=tokens where its rows "
                "are longer",
                name,
            )


def _by_chance(due: float, history: History) -> bool:
    """Whether chance decides how often a channel with this due share is drawn in a window."""
    draws = history.max_channels * history.window
    return history.max_channels < len(history.channels) and due * draws < TIMES_SEEN


def _shares(
    history: History, facts: ModelFacts
) -> Iterator[tuple[str, float, float, float | None]]:
    """(channel, its share in the newest window, standard error, target) of each of several."""
    targets = facts.target_shares_at(history.last.get("step", 0))
    rows = [row for row in history.recent() if number(row, LOSS) is not None]
    measured = any(key.startswith(SHARE) for row in rows for key in row)
    if len(history.channels) < 2 or len(rows) < history.window or not measured:
        return
    for name in history.channels:
        # A step without a token of the channel has no entry, which means a share of 0.
        values = [number(row, SHARE + name) or 0.0 for row in rows]
        yield name, fmean(values), mean_error(values), targets.get(name)


SPECIAL_ROWS = 100  # rows in which a special token should have been learned
SPECIAL_LOSS = 0.5  # below it a special token is learned well enough
SPECIAL_FALL = 0.1  # share of its first loss that it should have fallen


def special_tokens(history: History, config: DiagnoseConfig, facts: ModelFacts) -> Iterator[Alarm]:
    """The loss of a special token that is high and does not fall."""
    for key, count in history.num_special.items():
        if count < SPECIAL_ROWS or not history.from_first_step:
            continue
        start, now = history.start(key), column(list(history.rows), key)
        if len(now) < min(10, history.window):
            continue
        then, level = median(start[: history.window]), median(now[-history.window :])
        if level < SPECIAL_LOSS or level < (1 - SPECIAL_FALL) * then:
            continue
        name = key.removeprefix(SPECIAL)
        accuracy = column(list(history.rows)[-history.window :], f"special_token_accuracy/{name}")
        right = f", right {median(accuracy):.0%} of the time" if accuracy else ""
        yield Alarm(
            "special_tokens",
            history.last["step"],
            Level.warning,
            f"the loss of {name} was {then:.3g} and is {level:.3g} after {count} logged steps"
            f"{right}: the model does not learn where it belongs; of an end-of-turn token that "
            "means answers that never stop",
            "check with `posttrain inspect` that it is supervised and one token; if it is new to "
            "the model, its embedding and the head must be trained too (adapters leave them out)",
            name,
        )
