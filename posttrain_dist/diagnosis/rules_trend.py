"""Rules over the level of the loss: one that rises, one that does not move. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Iterator
from statistics import fmean, median

from posttrain_dist.diagnosis import DiagnoseConfig
from posttrain_dist.diagnosis.alarms import Alarm, Level, go_back
from posttrain_dist.diagnosis.facts import ModelFacts
from posttrain_dist.diagnosis.history import (
    CHANNEL,
    HELD_OUT,
    LOSS,
    MEDIAN_ERROR,
    SHARE,
    Block,
    History,
    Row,
    column,
    median_error,
    noise,
)

RISE = 0.2  # share of its lowest level by which a loss has risen
RISE_SIGMAS = 6.0  # ... and by how many standard errors of that level
RISEN_ROWS = 0.75  # share of the window's rows that a rise has lifted
REPEATED_RISE = 1.5  # times an earlier rise, from which on a rise is no repetition of it
RISE_BLOCKS = 4  # newest blocks, which may be this rise itself and are no earlier one


def rising_loss(history: History, config: DiagnoseConfig, facts: ModelFacts) -> Iterator[Alarm]:
    """The level of the loss lies above its lowest level, and not because of the mix of channels.

    Hard or noisy data makes a loss level off, never rise.
    """
    rows, lowest = history.recent(), history.lowest
    losses = column(rows, LOSS)
    count = history.num_mixture_rows
    if lowest is None or count < 2 * history.window or len(losses) < history.window / 2:
        return
    floor = lowest.levels[LOSS]
    level = min(median(losses), median(losses[-max(3, len(losses) // 3) :]))  # not recovering
    if level - floor <= RISE * abs(floor):
        return
    risen = sum(loss > (level + floor) / 2 for loss in losses)
    if risen < RISEN_ROWS * len(losses):
        return  # a bump that fills half of the window
    # The noise of all kept rows: that of one window is too uncertain.
    deviation = noise(column(list(history.rows), LOSS))
    error = math.sqrt(2) * MEDIAN_ERROR * deviation / math.sqrt(len(losses))
    # A loss that has risen and come back before may do so again; the newest blocks are left out,
    # because they may be this rise itself.
    before = _largest_rise(list(history.levels)[:-RISE_BLOCKS])
    if level - floor <= max(RISE_SIGMAS * error, REPEATED_RISE * before):
        return
    alike = _like_for_like(rows, lowest)
    if alike is not None and alike <= (level - floor) / 2:
        return  # harder channels came in, each is about as good as it was
    yield Alarm(
        "rising_loss",
        history.last["step"],
        Level.error,
        f"the loss rose from its lowest level {floor:.3g} (up to step {lowest.last_step}) to "
        f"{level:.3g}; even noise levels off, so this is the learning rate or the code that "
        "trains, not hard data",
        f"stop; {go_back(lowest.last_step)} and lower optimizer.lr (by 3 to 10 times), or raise "
        "optimizer.warmup_ratio",
    )


def _largest_rise(levels: list[float]) -> float:
    """How far a level lay above an earlier one at most."""
    largest, lowest = 0.0, math.inf
    for level in levels:
        lowest = min(lowest, level)
        largest = max(largest, level - lowest)
    return largest


def _like_for_like(rows: list[Row], lowest: Block) -> float | None:
    """Change of the channels' levels since the lowest block, weighted by their newest shares.

    None: no channel has a level then and now. Zero: those that have are less than half of the
    weight.
    """
    change = weight = 0.0
    total = sum(fmean(column(rows, key) or [0.0]) for key in _keys(rows, SHARE))
    for key in _keys(rows, CHANNEL):
        values, then = column(rows, key), lowest.levels.get(key)
        shares = column(rows, SHARE + key.removeprefix(CHANNEL))
        if then is None or len(values) < 3 or not shares:
            continue
        change += fmean(shares) * (median(values) - then)
        weight += fmean(shares)
    if not total:
        return None
    return change / weight if weight > total / 2 else 0.0


def _keys(rows: list[Row], prefix: str) -> list[str]:
    return sorted({key for row in rows for key in row if key.startswith(prefix)})


STALL_ROWS = 100  # rows after warm-up in which a loss should have moved
STALL_FALL = 0.05  # share of the first loss that training should have fallen
STALL_EVAL_FALL = 0.02  # ... and the held-out loss, which has no noise
FIRST_VALUES = 5  # values that the level of the first steps is taken over
FALL_SIGMAS = 1.5  # standard errors of a fall that speak against a stall
ZERO_ROWS = 5  # rows with a gradient of 0 that are no chance


def stall(history: History, config: DiagnoseConfig, facts: ModelFacts) -> Iterator[Alarm]:
    """A loss that is flat from the first step on, or a gradient that is zero."""
    norms = column(history.recent(ZERO_ROWS), "train/grad_norm")
    if len(norms) == ZERO_ROWS and not any(norms):
        yield Alarm(
            "stall",
            history.last["step"],
            Level.error,
            f"the gradient norm was 0 in the last {ZERO_ROWS} logged steps: nothing is trained",
            "check that some parameter is trainable and that rows have supervised tokens",
        )
        return
    if history.rows_at_rate < STALL_ROWS or not history.from_first_step:
        return
    flat = _flat(history)
    if flat is None:
        return
    rate = history.rate_mark
    hint = "the learning rate is 0" if rate == 0 else "the steps are too small to change anything"
    usual = " (full training about 1e-5, adapters about 2e-4)" if facts.token_loss else ""
    yield Alarm(
        "stall",
        history.last["step"],
        Level.warning,
        f"after {history.num_rows} logged steps {flat}: {hint}, or the model knows these rows "
        "already",
        f"raise optimizer.lr 3 to 10 times{usual}, and check that the trainable parameters are "
        "those that you mean",
    )


def _flat(history: History) -> str | None:
    """Which loss has not fallen, from where to where; None where one may have.

    Held-out rows are always the same, so their loss has no noise. The training loss may have
    fallen if three standard errors allow it, or if it surely fell, however little; where the
    mixture has changed since the first step, what it fell from is not known.
    """
    first, best = history.first_evaluation, history.best_of_run
    latest = history.evaluations[-1] if history.evaluations else None
    if first and latest and best and first.step < latest.step and HELD_OUT in first.held_out:
        then, trained = first.held_out[HELD_OUT], latest.step - first.step
        enough = trained >= STALL_ROWS * (history.last["step"] / max(history.num_rows, 1))
        fall = STALL_EVAL_FALL * then
        moved = best.value <= then - fall or latest.held_out.get(HELD_OUT, then) > then + fall
        if moved or not enough:
            return None
        return f"the held-out loss was {then:.3g} and has come no lower than {best.value:.3g}"
    start, now = history.start(LOSS), column(list(history.rows), LOSS)
    mixed = history.num_mixture_rows < history.num_rows
    if mixed or len(start) < history.window or history.lowest is None:
        return None
    # A fall within the very first steps counts too.
    then, level = max(median(start), median(start[:FIRST_VALUES])), median(now)
    fall = STALL_FALL * then
    if min(level, history.lowest.levels[LOSS]) <= then - fall or level > then + fall:
        return None
    error = 3 * math.hypot(median_error(start), median_error(now))
    newest = column(history.recent(), LOSS)
    if level - error <= then - fall or _sigmas_below(start[: history.window], newest) > FALL_SIGMAS:
        return None
    return f"the training loss was {then:.3g} and is {level:.3g}, which may be noise"


def _sigmas_below(before: list[float], after: list[float]) -> float:
    """By how many standard errors `after` lies lower: the rank-sum test of Mann and Whitney."""
    pairs = len(before) * len(after)
    lower = sum((b > a) + 0.5 * (b == a) for b in before for a in after)
    error = math.sqrt(pairs * (len(before) + len(after) + 1) / 12)
    return (lower - pairs / 2) / error if pairs else 0.0
