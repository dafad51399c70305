"""Rules over the loss of the whole run. Each is a pure function of the history."""

from __future__ import annotations

import math
from collections.abc import Iterator
from statistics import fmean, median

from posttrain_dist.diagnosis.alarms import Alarm, DiagnoseConfig, Level, ModelFacts, go_back
from posttrain_dist.diagnosis.history import (
    CHANNEL,
    HELD_OUT,
    LOSS,
    MEDIAN_ERROR,
    SHARE,
    WINDOWS,
    Block,
    History,
    Row,
    column,
    median_error,
    noise,
    number,
    spread,
)

MEDIUM, LARGE = 3e9, 30e9  # parameters from which a pretrained model's first loss is known
FIRST_ROWS = 10  # a training row of a later step says little about the untrained model
RISE_BLOCKS = 4  # blocks that a rise may last while those before it are looked for
MOST = 0.75  # share of the window's rows that a rise has lifted
NEWS = 1.5  # times an earlier rise, from which on a rise is no repetition of it
SPIKE_ROWS = 20  # rows that a level is known from before a spike is looked for
FIRST_VALUES = 5  # values that the level of the first steps is taken over
FALL_SIGMAS = 1.5  # standard errors of a fall that speak against a stall
DEAD_ROWS = 5  # rows without any gradient that are no chance
NOT_FINITE = (LOSS, HELD_OUT, "train/grad_norm")


def initial_loss(history: History, config: DiagnoseConfig, facts: ModelFacts) -> Iterator[Alarm]:
    """The loss before training against what a model of this size, or a random head, gives."""
    step, loss = _first_loss(history) if history.known else (0, None)
    if loss is None or not facts.token_loss:
        return

    def alarm(level: Level, message: str, fix: str) -> Alarm:
        return Alarm("initial_loss", step, level, f"the first loss is {loss:.3g}; {message}", fix)

    uniform = math.log(facts.vocab_size) if facts.vocab_size else None
    around = f"ln V = {uniform:.3g}, the loss of a random guess" if uniform else ""
    band = config.random_band
    if uniform and facts.random_weights:
        if abs(loss - uniform) > band * uniform:
            message = f"case random head: a model trained from nothing begins at {around}"
            fix = "far above it the weights are drawn too wide; below it labels leak into the input"
            yield alarm(Level.warning, message, fix)
        return
    if uniform and loss > (1 - band) * uniform:
        message = f"case pretrained: that is near or above {around}, as if nothing had been learned"
        yield alarm(
            Level.error,
            message,
            "check that the tokenizer belongs to the model, that no weight (lm_head, embeddings) "
            "was newly drawn when it was loaded, and with `posttrain inspect` that the labels are "
            "the next tokens",
        )
        return
    if facts.random_weights or facts.parameters is None or facts.parameters < MEDIUM:
        return  # what a small pretrained model gives depends on the data too much
    large = facts.parameters >= LARGE
    low, high = (
        (config.large_low, config.large_high) if large else (config.medium_low, config.medium_high)
    )
    size = f"{facts.parameters / 1e9:.0f}B parameters"
    usual = "1.0 to 2.0" if large else "about 2.0"
    expected = f"case pretrained, {size}: {usual} is usual, {low:g} to {high:g} is expected"
    if loss > high:
        fix = "check the chat template and the mask with `posttrain inspect`, and the language"
        yield alarm(Level.warning, expected, f"{fix} and format of the rows")
    elif loss < low:
        fix = "check that the mask leaves the prompt out and that the model was not trained on "
        yield alarm(Level.info, expected, f"{fix}these rows before; else it knows this task well")


def _first_loss(history: History) -> tuple[int, float | None]:
    """Held-out loss before training, else the training loss of the first rows."""
    first = history.first_evaluation
    if first is not None and first.step == 0 and HELD_OUT in first.held_out:
        return 0, first.held_out[HELD_OUT]
    row = history.first_row
    if not row or row["step"] > FIRST_ROWS:
        return 0, None
    return row["step"], number(row, LOSS)


def not_finite(history: History, config: DiagnoseConfig, facts: ModelFacts) -> Iterator[Alarm]:
    """NaN or infinity in a loss or in the gradient norm of the newest row."""
    row = history.last
    keys = [key for key in row if key in NOT_FINITE or "channel_loss/" in key]
    lost = [key for key in keys if isinstance(row[key], float) and not math.isfinite(row[key])]
    if not lost:
        return
    first = history.num_rows <= 1
    why = (
        "before anything was learned: a row, a weight or the number format is at fault"
        if first
        else "the weights are lost or about to be"
    )
    fix = (
        "try train.dtype=float32; if it stays, the weights of the model hold NaN"
        if first
        else f"go back to a checkpoint before step {row['step']}, halve optimizer.lr, keep "
        "optimizer.clip above 0, and look at the rows of this step in samples.log"
    )
    yield Alarm(
        "not_finite", row["step"], Level.error, f"{', '.join(lost)} is NaN or infinite; {why}", fix
    )


def spike(history: History, config: DiagnoseConfig, facts: ModelFacts) -> Iterator[Alarm]:
    """One step far above the level of the steps before it."""
    if history.last.get("step") != _newest_step(history):
        return
    before, value = column(history.recent(before=1), LOSS), number(history.last, LOSS)
    if value is None or len(before) < SPIKE_ROWS:
        return
    level = median(before)
    if value - level <= config.spike_rise * level:
        return
    # In logarithms: the noise of a loss leans to high values.
    kept = [math.log(v) for v in column(history.recent(WINDOWS * history.window, 1), LOSS) if v > 0]
    if min(level, *before) <= 0 or len(kept) < SPIKE_ROWS:
        return
    deviation = max(spread([math.log(v) for v in before]), noise(kept))
    if math.log(value / level) <= config.spike_sigmas * deviation:
        return
    step = history.last["step"]
    norms = column(history.recent(before=1), "train/grad_norm")
    norm = number(history.last, "train/grad_norm")
    message = f"the loss is {value:.3g}, {value / level:.1f} times its level of {level:.3g}"
    if norm is not None and norms:
        message += f"; gradient norm {norm:.3g}, usually {median(norms):.3g}"
    yield Alarm(
        "spike",
        step,
        Level.warning,
        f"{message}: a broken row, or a step that was too large",
        f"look at the rows of step {step} in samples.log; where spikes repeat, lower optimizer.lr "
        "or optimizer.clip, or raise optimizer.warmup_ratio",
    )


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
    if level - floor <= config.rise * floor:
        return
    risen = sum(loss > (level + floor) / 2 for loss in losses)
    if risen < MOST * len(losses):
        return  # a bump that fills half of the window
    # The noise of all kept rows: that of one window is known too badly.
    deviation = noise(column(list(history.rows), LOSS))
    error = math.sqrt(2) * MEDIAN_ERROR * deviation / math.sqrt(len(losses))
    # A loss that has risen and come back before may do so again; the newest blocks are left out,
    # because they may be this rise itself.
    before = _largest_rise(list(history.levels)[:-RISE_BLOCKS])
    if level - floor <= max(config.rise_sigmas * error, NEWS * before):
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

    None: no channel is known then and now. Zero: those known are less than half of the weight.
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


def low_loss(history: History, config: DiagnoseConfig, facts: ModelFacts) -> Iterator[Alarm]:
    """A training loss so low that the rows are known by heart."""
    losses = column(history.recent(), LOSS)
    if not facts.token_loss or len(losses) < history.window or median(losses) >= config.low_loss:
        return
    step, level = history.last["step"], median(losses)
    held = history.evaluations[-1].held_out.get(HELD_OUT) if history.evaluations else None
    seen = f"the training loss is {level:.2g}, below {config.low_loss:g}"
    if held is not None and held < config.low_loss:
        yield Alarm(
            "low_loss",
            step,
            Level.info,
            f"{seen}, and the held-out loss {held:.2g} is as low: the task is solved, or the "
            "held-out rows are in training too",
            "look for near duplicates of the held-out rows; if there are none, train for less",
        )
        return
    known = "" if held is None else f", the held-out loss is {held:.2g}"
    best = history.best_of_run
    back = f", or {go_back(best.step)}, the best on held-out rows" if best else ""
    yield Alarm(
        "low_loss",
        step,
        Level.warning,
        f"{seen}{known}: the rows are learned by heart (overfitting)",
        f"train for fewer epochs or on more rows, lower optimizer.lr{back}",
    )


def stall(history: History, config: DiagnoseConfig, facts: ModelFacts) -> Iterator[Alarm]:
    """A loss that is flat from the first step on, or a gradient that is zero."""
    norms = column(history.recent(DEAD_ROWS), "train/grad_norm")
    if len(norms) == DEAD_ROWS and not any(norms):
        yield Alarm(
            "stall",
            history.last["step"],
            Level.error,
            f"the gradient norm was 0 in the last {DEAD_ROWS} logged steps: nothing is trained",
            "check that some parameter is trainable and that rows have supervised tokens",
        )
        return
    if history.rows_at_rate < config.stall_rows or not history.known:
        return
    flat = _flat(history, config)
    if flat is None:
        return
    rate = history.rate_mark
    hint = "the learning rate is 0" if rate == 0 else "the steps are too small to learn anything"
    yield Alarm(
        "stall",
        history.last["step"],
        Level.warning,
        f"after {history.num_rows} logged steps {flat}: {hint}, or the model knows these rows "
        "already",
        "raise optimizer.lr 3 to 10 times (full training about 1e-5, adapters about 2e-4), and "
        "check that the trainable parameters are those that you mean",
    )


def _flat(history: History, config: DiagnoseConfig) -> str | None:
    """Which loss has not fallen, from where to where; None where one may have.

    Held-out rows are always the same, so their loss has no noise. The training loss may have
    fallen if three standard errors allow it, or if it surely fell, however little; where the
    mixture has changed since the first step, what it fell from is not known.
    """
    first, best = history.first_evaluation, history.best_of_run
    latest = history.evaluations[-1] if history.evaluations else None
    if first and latest and best and first.step < latest.step and HELD_OUT in first.held_out:
        then, trained = first.held_out[HELD_OUT], latest.step - first.step
        enough = trained >= config.stall_rows * (history.last["step"] / max(history.num_rows, 1))
        fall = config.stall_eval_fall * then
        moved = best.value <= then - fall or latest.held_out.get(HELD_OUT, then) > then + fall
        if moved or not enough:
            return None
        return f"the held-out loss was {then:.3g} and has come no lower than {best.value:.3g}"
    start, now = history.start(LOSS), column(list(history.rows), LOSS)
    mixed = history.num_mixture_rows < history.num_rows
    if mixed or len(start) < history.window or history.lowest is None:
        return None
    # What is learned in the very first steps has fallen too.
    then, level = max(median(start), median(start[:FIRST_VALUES])), median(now)
    fall = config.stall_fall * then
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


def _newest_step(history: History) -> int:
    return history.rows[-1]["step"] if history.rows else -1
