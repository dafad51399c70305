"""What the rules read: the rows of metrics.jsonl so far, in bounded memory, and levels of them.

Levels are medians and noise is a median deviation, so that one outlier changes neither.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice, pairwise
from statistics import fmean, median
from typing import Any

Row = Mapping[str, Any]

LOSS, HELD_OUT = "train/loss", "eval/loss"
CHANNEL, HELD_OUT_CHANNEL = "channel_loss/", "eval_channel_loss/"
SHARE, SPECIAL = "channel_share/", "special_token_loss/"
PREFERRED = "preferred"  # not a metric: what `preferred_value` gives
WINDOWS = 4  # windows of rows that are kept
EVALUATIONS = 16  # evaluations that are kept
BLOCKS = 64  # blocks whose level is kept
# Of a normal distribution: standard deviation / median absolute deviation, and the standard
# error of a median / that of a mean.
MAD_TO_SIGMA, MEDIAN_ERROR = 1.4826, 1.2533


def number(row: Row, key: str) -> float | None:
    """A metric, where it is a finite number."""
    value = row.get(key)
    finite = isinstance(value, int | float) and math.isfinite(value)
    return float(value) if finite else None  # type: ignore[arg-type]


def column(rows: Sequence[Row], key: str) -> list[float]:
    """The finite values of a metric."""
    return [value for row in rows if (value := number(row, key)) is not None]


def preferred_value(row: Row) -> float | None:
    """Log p per token of the answers that a preference prefers, less that of its reference.

    Without a reference log p itself; None: the row has no such answers.
    """
    for key in row:
        objective, _, name = key.partition("/")
        if name not in ("chosen_tokens", "desirable_tokens") or objective.startswith("eval_"):
            continue
        kind, tokens = key.removesuffix("tokens"), number(row, key)
        total = number(row, f"{kind}logratio")
        total = number(row, f"{kind}logprob") if total is None else total
        return total / tokens if total is not None and tokens else None
    return None


def noise(values: Sequence[float]) -> float:
    """Standard deviation about a level that may drift: from differences of neighbours."""
    if len(values) < 3:
        return 0.0
    return MAD_TO_SIGMA * median(abs(b - a) for a, b in pairwise(values)) / math.sqrt(2)


def spread(values: Sequence[float]) -> float:
    """Standard deviation about the median, drift included."""
    middle = median(values)
    return MAD_TO_SIGMA * median(abs(value - middle) for value in values)


def mean_error(values: Sequence[float]) -> float:
    """Standard error of the mean."""
    count, middle = len(values), fmean(values)
    squares = math.fsum((value - middle) ** 2 for value in values)
    return math.sqrt(squares / (count * (count - 1))) if count > 1 else 0.0


def median_error(values: Sequence[float]) -> float:
    """Standard error of the median of noisy values."""
    return MEDIAN_ERROR * noise(values) / math.sqrt(len(values))


@dataclass(slots=True)
class Evaluation:
    """Held-out losses of one step, and the levels of training since the evaluation before.

    Both are keyed by `eval/loss` and `eval_channel_loss/<channel>`.
    """

    step: int
    held_out: dict[str, float]
    training: dict[str, float]


@dataclass(slots=True)
class Best:
    """The lowest held-out loss of one key, and the level of training then."""

    step: int
    value: float
    training: float | None


@dataclass(slots=True)
class Block:
    """The levels of `window` rows next to each other."""

    last_step: int
    levels: dict[str, float]  # of the loss and of each channel's


@dataclass(slots=True)
class History:
    """The rows so far. `add` takes each once, in order; the rules only read.

    Where the mixture of the data changes, the levels of training start again: its loss may rise or
    fall because the rows are others. Held-out rows stay the same.
    """

    window: int
    mixture_starts: Collection[int] = ()  # steps from which the data is mixed another way
    # False where a run goes on from another's checkpoint: its first rows are not known.
    from_first_step: bool = True
    last: Row = field(default_factory=dict)  # the newest row, of whatever kind
    num_rows: int = 0  # rows with a training loss
    mixture_since: int = 0  # first step of the present mixture
    num_mixture_rows: int = 0  # rows with a training loss since then
    rows: deque[Row] = field(default_factory=deque)  # the newest of them
    first_row: Row = field(default_factory=dict)
    # Values of the first two windows that have them: the loss, each special token's, and log p of
    # preferred answers.
    starts: dict[str, list[float]] = field(default_factory=dict)
    num_special: dict[str, int] = field(default_factory=dict)  # rows with this token's loss
    lowest: Block | None = None  # the whole block of this mixture with the lowest loss
    # Losses of the newest whole blocks of this mixture.
    levels: deque[float] = field(default_factory=lambda: deque(maxlen=BLOCKS))
    first_evaluation: Evaluation | None = None
    evaluations: deque[Evaluation] = field(default_factory=lambda: deque(maxlen=EVALUATIONS))
    best: dict[str, Best] = field(default_factory=dict)  # of this mixture
    best_of_run: Best | None = None  # of `eval/loss`
    channels: dict[str, None] = field(default_factory=dict)  # names seen so far
    max_channels: int = 0  # in one row
    rate_mark: float = 0.0  # at least half of the highest learning rate so far
    rows_at_rate: int = 0  # rows since the learning rate came to that mark: warm-up left out

    def add(self, row: Row) -> None:
        """Take in one row of metrics.jsonl."""
        self.last = row
        start = max((step for step in self.mixture_starts if step <= row["step"]), default=0)
        if start > self.mixture_since:
            self._change_mixture(start)
        num_channels = 0
        for key in row:
            group, _, name = key.partition("/")
            if group in ("channel_loss", "channel_share", "eval_channel_loss"):
                self.channels.setdefault(name)
                num_channels += group == "channel_share"
        self.max_channels = max(self.max_channels, num_channels)
        if LOSS in row:
            self._add_training(row)
        if HELD_OUT in row:
            self._add_evaluation(row)

    def recent(self, count: int | None = None, before: int = 0) -> list[Row]:
        """The newest `count` (default: window) rows, leaving out the very newest `before`."""
        end = len(self.rows) - before
        return list(islice(self.rows, max(0, end - (count or self.window)), max(0, end)))

    def start(self, key: str) -> list[float]:
        """The first values of the loss or of a special token's."""
        return self.starts.get(key, [])

    # ------------------------------------------------------------------------------- inside

    def _change_mixture(self, step: int) -> None:
        self.mixture_since = step
        if self.num_rows:  # not the first: the evaluation before training belongs to that one
            self.num_mixture_rows = 0
            self.rows.clear()
            self.lowest = None
            self.levels.clear()
            self.best.clear()

    def _add_training(self, row: Row) -> None:
        self.first_row = self.first_row or row
        self.num_rows += 1
        self.num_mixture_rows += 1
        self.rows.append(row)
        if len(self.rows) > WINDOWS * self.window:
            self.rows.popleft()
        for key in row:
            value = number(row, key) if key == LOSS or key.startswith(SPECIAL) else None
            if value is not None:
                start = self.starts.setdefault(key, [])
                if len(start) < 2 * self.window:
                    start.append(value)
                if key != LOSS:
                    self.num_special[key] = self.num_special.get(key, 0) + 1
        preferred = preferred_value(row)
        if preferred is not None:
            start = self.starts.setdefault(PREFERRED, [])
            if len(start) < 2 * self.window:
                start.append(preferred)
        rate = number(row, "train/lr") or 0.0
        if rate > 2 * self.rate_mark:  # still in warm-up: count again from here
            self.rows_at_rate = 0
            self.rate_mark = rate
        self.rows_at_rate += 1
        if self.num_mixture_rows % self.window == 0:
            self._close_block()

    def _close_block(self) -> None:
        rows = self.recent()
        keys = [LOSS, *(CHANNEL + name for name in self.channels)]
        columns = {key: column(rows, key) for key in keys}
        levels = {key: median(values) for key, values in columns.items() if len(values) >= 3}
        if LOSS not in levels:
            return
        self.levels.append(levels[LOSS])
        if self.lowest is None or levels[LOSS] < self.lowest.levels[LOSS]:
            self.lowest = Block(rows[-1]["step"], levels)

    def _add_evaluation(self, row: Row) -> None:
        since = self.evaluations[-1].step if self.evaluations else -1
        rows = [trained for trained in self.rows if trained["step"] > since]
        found = Evaluation(row["step"], {}, {})
        for key in (HELD_OUT, *(HELD_OUT_CHANNEL + name for name in self.channels)):
            value = number(row, key)
            if value is None:
                continue
            found.held_out[key] = value
            if trained := column(rows, training_key(key)):
                found.training[key] = median(trained)
            if key not in self.best or value < self.best[key].value:
                self.best[key] = Best(row["step"], value, found.training.get(key))
            elif self.best[key].training is None:  # the best one stands before training
                self.best[key].training = found.training.get(key)
        value = found.held_out.get(HELD_OUT)
        if value is not None and (self.best_of_run is None or value < self.best_of_run.value):
            self.best_of_run = self.best[HELD_OUT]
        self.evaluations.append(found)
        self.first_evaluation = self.first_evaluation or found


def training_key(key: str) -> str:
    """The training metric that belongs to a held-out one."""
    return LOSS if key == HELD_OUT else CHANNEL + key.removeprefix(HELD_OUT_CHANNEL)
