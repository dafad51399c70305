"""Rules over parts of the run: held-out rows, channels, special tokens. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Iterator
from statistics import fmean, median

from posttrain_dist.diagnosis.alarms import Alarm, DiagnoseConfig, Level, ModelFacts, go_back
from posttrain_dist.diagnosis.history import (
    HELD_OUT,
    HELD_OUT_CHANNEL,
    LOSS,
    MAD_TO_SIGMA,
    SHARE,
    SPECIAL,
    History,
    column,
    mean_error,
    number,
)

# Standard deviation of x[i - 1] - 2 x[i] + x[i + 1] for independent x of deviation 1.
SECOND_DIFFERENCE = math.sqrt(6)
EQUAL_PART = 0.1  # part of an equal share below which a channel of many is starved
TIMES_SEEN = 10  # times that a channel should be drawn in a window before its share says much


def overfitting(history: History, config: DiagnoseConfig, facts: ModelFacts) -> Iterator[Alarm]:
    """Over all channels: the training loss falls while the held-out loss rises."""
    yield from _overfitting("overfitting", HELD_OUT, "", history, config)


def channel_overfitting(
    history: History, config: DiagnoseConfig, facts: ModelFacts
) -> Iterator[Alarm]:
    """The same of each channel; a single channel is what `overfitting` looks at already."""
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
    jitter = config.overfit_sigmas * _jitter(values)
    least = max(config.overfit_rise * best.value, config.overfit_least, jitter)
    trained = median(e.training[key] for e in late)
    # Going back to near the best once means that it has not risen.
    risen = level - best.value > least and min(values[-count:]) > best.value + least / 2
    if not risen or trained >= (1 - config.overfit_rise) * best.training:
        return
    of = f"of channel {subject} " if subject else ""
    less = "give the channel a smaller share or more rows" if subject else "train for fewer epochs"
    yield Alarm(
        rule,
        history.last["step"],
        Level.warning,
        f"the held-out loss {of}rose from {best.value:.3g} at step {best.step} to {level:.3g} in "
        f"the last {count} evaluations, while its training loss fell from {best.training:.3g} to "
        f"{trained:.3g}: the rows are learned by heart",
        f"{go_back(best.step)}, or {less}, or lower optimizer.lr",
        subject,
    )


def _jitter(values: list[float]) -> float:
    """Standard deviation of an evaluation about a smooth curve; 0 where too few are known."""
    bends = [abs(a - 2 * b + c) for a, b, c in zip(values, values[1:], values[2:], strict=False)]
    return MAD_TO_SIGMA * median(bends) / SECOND_DIFFERENCE if bends else 0.0


def starved_channel(history: History, config: DiagnoseConfig, facts: ModelFacts) -> Iterator[Alarm]:
    """A channel that has hardly any weight, or far less than was asked for."""
    equal = 1 / max(1, len(history.channels))
    common = min(config.starved_share, EQUAL_PART * equal)
    for name, share, error, asked in _shares(history, facts):
        least = common if asked is None else asked / config.asked_ratio
        due = equal if asked is None else asked
        if share + 2 * error < least and not _by_chance(due, history):
            wanted = "" if asked is None else f", {asked:.1%} were asked for"
            yield Alarm(
                "starved_channel",
                history.last["step"],
                Level.warning,
                f"channel {name} has {share:.2%} of the weight in the last {history.window} logged "
                f"steps{wanted}: it is hardly learned, its losses are mostly noise",
                "give it more weight in data.sources or more rows, or leave it out",
                name,
            )


def dominating_channel(
    history: History, config: DiagnoseConfig, facts: ModelFacts
) -> Iterator[Alarm]:
    """A channel that leaves nothing to the others, or has far more than was asked for."""
    for name, share, error, asked in _shares(history, facts):
        most = config.dominating_share if asked is None else asked * config.asked_ratio
        if share - 2 * error > most and (asked is None or not _by_chance(asked, history)):
            wanted = "" if asked is None else f", {asked:.1%} were asked for"
            yield Alarm(
                "dominating_channel",
                history.last["step"],
                Level.warning,
                f"channel {name} has {share:.1%} of the weight in the last {history.window} logged "
                f"steps{wanted}: train/loss shows this channel alone, the others change little",
                "give the others more weight in data.sources, or data.mix_by=tokens where its rows "
                "are longer",
                name,
            )


def _by_chance(due: float, history: History) -> bool:
    """Whether chance decides how often a channel with this due share is drawn in a window."""
    draws = history.most_channels * history.window
    return history.most_channels < len(history.channels) and due * draws < TIMES_SEEN


def _shares(
    history: History, facts: ModelFacts
) -> Iterator[tuple[str, float, float, float | None]]:
    """(channel, its share in the newest window, standard error, asked share) of each of several."""
    asked = facts.asked_at(history.last.get("step", 0))
    rows = [row for row in history.recent() if number(row, LOSS) is not None]
    measured = any(key.startswith(SHARE) for row in rows for key in row)
    if len(history.channels) < 2 or len(rows) < history.window or not measured:
        return
    for name in history.channels:
        # A step without a token of the channel has no entry, which means a share of 0.
        values = [number(row, SHARE + name) or 0.0 for row in rows]
        yield name, fmean(values), mean_error(values), asked.get(name)


def special_tokens(history: History, config: DiagnoseConfig, facts: ModelFacts) -> Iterator[Alarm]:
    """The loss of a special token that is high and does not fall."""
    for key, count in history.num_special.items():
        if count < config.special_rows or not history.known:
            continue
        start, now = history.start(key), column(list(history.rows), key)
        if len(now) < min(10, history.window):
            continue
        then, level = median(start[: history.window]), median(now[-history.window :])
        if level < config.special_loss or level < (1 - config.special_fall) * then:
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
