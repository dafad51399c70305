"""Rules over single losses: the first one, NaN, spikes, one that is too low. Pure functions.

Losses are in nats per token.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from statistics import median

from posttrain_dist.diagnosis import DiagnoseConfig
from posttrain_dist.diagnosis.alarms import Alarm, Level, go_back
from posttrain_dist.diagnosis.facts import ModelFacts
from posttrain_dist.diagnosis.history import (
    HELD_OUT,
    LOSS,
    WINDOWS,
    History,
    column,
    noise,
    number,
    spread,
)

# Share of ln V, V the size of the vocabulary, around ln V that looks like a random head.
RANDOM_BAND = 0.1
# Parameters from which a pretrained model's first loss is known, and least and most of it.
MEDIUM_MODEL, MEDIUM_EXPECTED = 3e9, (1.0, 3.0)  # about 2
LARGE_MODEL, LARGE_EXPECTED = 30e9, (0.75, 2.5)  # 1 to 2
FIRST_ROWS = 10  # after this step a training row is no measure of the untrained model


def initial_loss(history: History, config: DiagnoseConfig, facts: ModelFacts) -> Iterator[Alarm]:
    """The loss before training against what a model of this size, or a random head, gives."""
    step, loss = _first_loss(history) if history.from_first_step else (0, None)
    if loss is None or not facts.token_loss:
        return

    def alarm(level: Level, message: str, fix: str) -> Alarm:
        return Alarm("initial_loss", step, level, f"the first loss is {loss:.3g}; {message}", fix)

    uniform = math.log(facts.vocab_size) if facts.vocab_size else None
    around = f"ln V = {uniform:.3g}, the loss of a random guess" if uniform else ""
    if uniform and facts.random_weights:
        if abs(loss - uniform) > RANDOM_BAND * uniform:
            message = f"case random head: a model trained from scratch begins at {around}"
            fix = "far above it the weights are drawn too wide; below it labels leak into the input"
            yield alarm(Level.warning, message, fix)
        return
    if uniform and loss > (1 - RANDOM_BAND) * uniform:
        message = f"case pretrained: that is near or above {around}, as if the model were untrained"
        yield alarm(
            Level.error,
            message,
            "check that the tokenizer belongs to the model, that no weight (lm_head, embeddings) "
            "was newly drawn when it was loaded, and with `posttrain inspect` that the labels are "
            "the next tokens",
        )
        return
    if facts.random_weights or facts.parameters is None or facts.parameters < MEDIUM_MODEL:
        return  # what a small pretrained model gives depends on the data too much
    large = facts.parameters >= LARGE_MODEL
    low, high = LARGE_EXPECTED if large else MEDIUM_EXPECTED
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


NOT_FINITE = (LOSS, HELD_OUT, "train/grad_norm")  # keys, beside the losses of channels


def not_finite(history: History, config: DiagnoseConfig, facts: ModelFacts) -> Iterator[Alarm]:
    """NaN or infinity in a loss or in the gradient norm of the newest row."""
    row = history.last
    keys = [key for key in row if key in NOT_FINITE or "channel_loss/" in key]
    nonfinite = [key for key in keys if isinstance(row[key], float) and not math.isfinite(row[key])]
    if not nonfinite:
        return
    first = history.num_rows <= 1
    why = (
        "before the first update: a row, a weight or the number format is at fault"
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
        "not_finite",
        row["step"],
        Level.error,
        f"{', '.join(nonfinite)} is NaN or infinite; {why}",
        fix,
    )


FAR_OFF = 4.0  # times the bound: no row of data does that to a model
DIVERGED = 2.0  # times the bound, in two values on end
RISEN_ROWS, FIRST_FEW = 5, 3  # newest rows that are all above DIVERGED times the first ones


def divergence(history: History, config: DiagnoseConfig, facts: ModelFacts) -> Iterator[Alarm]:
    """A loss that is much worse than a random guess, or than the run began; of few rows too.

    The bound is ln V, or the first loss where that is higher. `rising_loss` and `spike` compare
    with a level, and one takes many rows.
    """
    if not facts.token_loss or not facts.vocab_size:
        return
    step, first = history.last["step"], _first_loss(history)[1] if history.from_first_step else None
    bound = max(math.log(facts.vocab_size), first or 0.0)
    newest = column(history.recent(2), LOSS) if _newest_step(history) == step else []
    held_out = number(history.last, HELD_OUT)
    values = [*newest, *([held_out] if held_out is not None and step else [])]
    far_off = any(value > FAR_OFF * bound for value in values[-1:] + newest[-1:])
    twice = len(values) >= 2 and min(values[-2:]) > DIVERGED * bound
    if not (far_off or twice or _has_risen(history)):
        return
    began = f"began at {first:.3g}" if first is not None else f"of a random guess is {bound:.3g}"
    yield Alarm(
        "divergence",
        step,
        Level.error,
        f"the loss is {values[-1] if values else math.nan:.3g}, and {began}: the steps are too "
        "large for these weights, and what they held is lost",
        "stop; start again from an earlier checkpoint or from the model, with optimizer.lr 10 "
        "times lower and optimizer.clip above 0",
    )


def _has_risen(history: History) -> bool:
    """Whether a run that has just begun stands far above its first rows, all of one mixture."""
    if history.num_rows >= 2 * history.window or history.num_mixture_rows < history.num_rows:
        return False  # `rising_loss` looks at it; or the rows are others
    start, newest = history.start(LOSS)[:FIRST_FEW], column(history.recent(RISEN_ROWS), LOSS)
    if not history.from_first_step or history.num_rows < FIRST_FEW + RISEN_ROWS or not newest:
        return False
    first = _first_loss(history)[1] or 0.0
    return min(newest) > DIVERGED * max(first, *start)


SPIKE_RISE = 0.5  # share of the level that one row is above it
SPIKE_SIGMAS = 5.0  # ... and how many standard deviations of its logarithm
SPIKE_ROWS = 20  # rows that the level is taken over at least


def spike(history: History, config: DiagnoseConfig, facts: ModelFacts) -> Iterator[Alarm]:
    """One step far above the level of the steps before it."""
    if history.last.get("step") != _newest_step(history):
        return
    before, value = column(history.recent(before=1), LOSS), number(history.last, LOSS)
    if value is None or len(before) < SPIKE_ROWS:
        return
    level = median(before)
    if value - level <= SPIKE_RISE * level:
        return
    # In logarithms: the noise of a loss leans to high values.
    kept = [math.log(v) for v in column(history.recent(WINDOWS * history.window, 1), LOSS) if v > 0]
    if min(level, *before) <= 0 or len(kept) < SPIKE_ROWS:
        return
    deviation = max(spread([math.log(v) for v in before]), noise(kept))
    if math.log(value / level) <= SPIKE_SIGMAS * deviation:
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


def _newest_step(history: History) -> int:
    return history.rows[-1]["step"] if history.rows else -1


def low_loss(history: History, config: DiagnoseConfig, facts: ModelFacts) -> Iterator[Alarm]:
    """A training loss so low that the rows are memorised."""
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
    held_out = "" if held is None else f", the held-out loss is {held:.2g}"
    best = history.best_of_run
    back = f", or {go_back(best.step)}, the best on held-out rows" if best else ""
    yield Alarm(
        "low_loss",
        step,
        Level.warning,
        f"{seen}{held_out}: the rows are memorised (overfitting)",
        f"train for fewer epochs or on more rows, lower optimizer.lr{back}",
    )
