"""The order of a run: which packs are in which step, a pure function of (seed, step).

The packs of a phase's epochs stand in one endless line; step k takes the next B of it. Without a
schedule of weights there is one phase, the whole run.
"""

from __future__ import annotations

import math
from bisect import bisect_right

import numpy as np

from posttrain_dist.data.mixing import Mixture
from posttrain_dist.data.packing import Ints, Plan, plan_epoch
from posttrain_dist.errors import ConfigError

_KEPT_PLANS = 2  # of each phase


class Order:
    """Packs of every step.

    To know where epoch e of a phase begins, its epochs before e are planned once more: about 0.4 s
    for a million samples, far below what training on them took.

    Args:
        lengths: tokens of each sample.
        max_length: tokens of a pack at most.
        window: samples that packing may reorder among themselves.
        seed: of the run.
        batch_size: packs of a step.
        mixture: what an epoch draws; None: every sample once.
    """

    def __init__(
        self,
        lengths: Ints,
        *,
        max_length: int,
        window: int,
        seed: int,
        batch_size: int,
        mixture: Mixture | None = None,
    ) -> None:
        self._batch_size = batch_size
        starts = [1] if mixture is None else mixture.phase_starts
        self._first = [(step - 1) * batch_size for step in starts]  # pack of each phase
        self._lines = [
            Line(lengths, max_length, window, seed, phase, mixture) for phase in range(len(starts))
        ]
        self._end: int | None = None  # packs of the whole run; None: no end

    def settle(
        self, steps: int | None = None, epochs: float | None = None, tokens: int | None = None
    ) -> int:
        """Where the run ends: after `steps`, else `tokens`, else `epochs` (1 where that is null).

        Returns the number of steps. Of tokens or epochs the last step may hold fewer packs than the
        others; tokens end with the pack that reaches them. A phase that is cut short counts as
        the part of an epoch that it took.

        Raises:
            ConfigError: several are given, or none is above 0.
        """
        given = {
            name: value
            for name, value in (("steps", steps), ("tokens", tokens), ("epochs", epochs))
            if value is not None
        }
        if len(given) > 1 or any(value <= 0 for value in given.values()):
            said = ", ".join(f"train.{name}={value}" for name, value in given.items())
            raise ConfigError(
                f"the run cannot end at {said}",
                where="train",
                fix="give one of steps, epochs and tokens, above 0",
            )
        if steps is not None:
            self._end = None
            return steps
        left: float = tokens if tokens is not None else 1.0 if epochs is None else epochs
        measure = Line.tokens if tokens is not None else Line.epochs
        for phase, line in enumerate(self._lines):
            first = self._first[phase]
            if phase + 1 < len(self._lines):
                inside = measure(line, self._first[phase + 1] - first)
                if inside < left:
                    left -= inside
                    continue
            packs = line.after_tokens(int(left)) if tokens is not None else line.after_epochs(left)
            self._end = first + packs
            break
        assert self._end is not None
        return math.ceil(self._end / self._batch_size)

    def packs(self, k: int) -> list[Ints]:
        """The samples of each pack of step k, from 1."""
        start, end = (k - 1) * self._batch_size, k * self._batch_size
        if self._end is not None:
            end = min(end, self._end)
        # A phase begins with a step, so a step lies in one phase.
        phase = bisect_right(self._first, start) - 1
        line, first = self._lines[phase], self._first[phase]
        return [line.pack(index - first) for index in range(start, end)]


class Line:
    """The packs of all epochs of one phase, end to end; plans them as they are asked for."""

    def __init__(
        self,
        lengths: Ints,
        max_length: int,
        window: int,
        seed: int,
        phase: int,
        mixture: Mixture | None,
    ) -> None:
        self._lengths = lengths
        self._max_length, self._window = max_length, window
        self._seed, self._phase, self._mixture = seed, phase, mixture
        self._starts = [0]  # first pack of each epoch planned so far, and of the next one
        self._tokens = [0]  # tokens of all epochs before each of them
        self._plans: dict[int, Plan] = {}  # the ones planned last

    def pack(self, index: int) -> Ints:
        """Samples of one pack."""
        epoch = self._epoch_of(index)
        return self.plan(epoch)[index - self._starts[epoch]]

    def plan(self, epoch: int) -> Plan:
        """The plan of one epoch, from 0."""
        if epoch not in self._plans:
            while len(self._plans) >= _KEPT_PLANS:
                del self._plans[next(iter(self._plans))]
            drawn = None if self._mixture is None else self._mixture.draw(self._phase, epoch)
            self._plans[epoch] = plan_epoch(
                self._lengths,
                self._max_length,
                self._window,
                self._seed,
                epoch,
                phase=self._phase,
                drawn=drawn,
            )
        return self._plans[epoch]

    def epochs(self, packs: int) -> float:
        """How many epochs the first `packs` packs are."""
        epoch = self._epoch_of(packs)
        start, end = self._starts[epoch : epoch + 2]
        return epoch + (packs - start) / (end - start)

    def tokens(self, packs: int) -> int:
        """How many tokens the first `packs` packs hold."""
        epoch = self._epoch_of(packs)
        inside = self.plan(epoch).sums(self._lengths)[: packs - self._starts[epoch]]
        return self._tokens[epoch] + int(inside.sum())

    def after_epochs(self, epochs: float) -> int:
        """Packs until `epochs` are over; of a part of an epoch, that part of its packs."""
        whole, part = divmod(epochs, 1)
        self._extend(int(whole) + (part > 0))
        start = self._starts[int(whole)]
        return start + (math.ceil(part * len(self.plan(int(whole)))) if part else 0)

    def after_tokens(self, tokens: int) -> int:
        """Packs until `tokens` are reached."""
        while self._tokens[-1] < tokens:
            self._extend(len(self._starts))
        epoch = bisect_right(self._tokens, tokens - 1) - 1
        reached = self._tokens[epoch] + np.cumsum(self.plan(epoch).sums(self._lengths))
        return self._starts[epoch] + int(np.searchsorted(reached, tokens)) + 1

    def _epoch_of(self, index: int) -> int:
        while self._starts[-1] <= index:
            self._extend(len(self._starts))
        return bisect_right(self._starts, index) - 1

    def _extend(self, epoch: int) -> None:
        """Know where `epoch` begins."""
        while len(self._starts) <= epoch:
            plan = self.plan(len(self._starts) - 1)
            self._starts.append(self._starts[-1] + len(plan))
            self._tokens.append(self._tokens[-1] + int(self._lengths[plan.order].sum(dtype=int)))
