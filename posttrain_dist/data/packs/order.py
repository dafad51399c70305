"""The order of a run: which packs are in which step, a pure function of (seed, step).

The packs of a phase's epochs stand in one endless line; step k takes the next B of it. Without a
schedule of weights there is one phase, the whole run. A phase that is cut short leaves an epoch
unfinished: the next one begins with the rest of it, so epochs of the run end at whole numbers.
"""

from __future__ import annotations

import math
import threading
from bisect import bisect_right
from collections.abc import Sequence
from functools import partial
from itertools import chain

import numpy as np

from posttrain_dist.data import MAX_PASSES
from posttrain_dist.data.packs.mixing import Mixture, MixtureState
from posttrain_dist.data.packs.packing import Ints, Plan, plan_epoch
from posttrain_dist.errors import ConfigError

_KEPT_PLANS = 2  # of each phase


class Order:
    """Packs of every step.

    To know where an epoch begins, and what a phase left, all epochs before are planned once more:
    about 0.4 s for a million samples, far below what training on them took.

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
        self._begin = partial(PhasePlan, lengths, max_length, window, seed, mixture)
        start = MixtureState() if mixture is None else mixture.start
        self._plans_by_phase = [self._begin(0, start)]  # of the phases known so far
        self._end: int | None = None  # packs of the whole run; None: no end
        self._planning = threading.Lock()  # the next step is made in a thread

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
        whole = 1.0 if epochs is None else epochs
        for phase, first in enumerate(self._first):
            plan = self.phase_plan(phase)
            packs = plan.after_epochs(whole) if tokens is None else plan.after_tokens(tokens)
            # Not by what the next phase would begin with: that may be epochs beyond the end.
            if first + packs <= next(iter(self._first[phase + 1 :]), math.inf):
                break
        self._end = self._first[phase] + packs
        return math.ceil(self._end / self._batch_size)

    def packs(self, k: int) -> list[Ints]:
        """The samples of each pack of step k, from 1."""
        start, end = (k - 1) * self._batch_size, k * self._batch_size
        if self._end is not None:
            end = min(end, self._end)
        # A phase begins with a step, so a step lies in one phase.
        phase = bisect_right(self._first, start) - 1
        with self._planning:
            plan, first = self.phase_plan(phase), self._first[phase]
            return [plan.pack(index - first) for index in range(start, end)]

    def sums(self, values: Sequence[Ints], packs: int) -> Ints:
        """Of the first `packs` packs of the run, the sum over each of every one of `values`.

        Args:
            values: arrays of one number per sample.

        Returns:
            [values, packs], fewer packs where the run ends before.
        """
        packs = packs if self._end is None else min(packs, self._end)
        ends = [*self._first[1:], packs]
        parts = []
        with self._planning:
            for phase, (first, end) in enumerate(zip(self._first, ends, strict=True)):
                if first < packs:
                    count = min(end, packs) - first
                    parts.append(self.phase_plan(phase).sums(values, count))
        return np.concatenate(parts, axis=1)

    def phase_plan(self, phase: int) -> PhasePlan:
        """The packs of one phase, from 0; it begins with what the phases before left."""
        while len(self._plans_by_phase) <= phase:
            number = len(self._plans_by_phase)
            state = self._plans_by_phase[-1].state_after(
                self._first[number] - self._first[number - 1]
            )
            self._plans_by_phase.append(self._begin(number, state))
        return self._plans_by_phase[phase]


class PhasePlan:
    """The packs of all epochs of one phase, end to end; plans them as they are asked for."""

    def __init__(
        self,
        lengths: Ints,
        max_length: int,
        window: int,
        seed: int,
        mixture: Mixture | None,
        phase: int,
        before: MixtureState,
    ) -> None:
        self._lengths = lengths
        self._max_length, self._window = max_length, window
        self._seed, self._mixture, self._phase = seed, mixture, phase
        self.before = before  # the phase
        self._starts = [0]  # first pack of each epoch planned so far, and of the next one
        self._tokens = [before.tokens]  # tokens that the run has before each of them
        self._plans: dict[int, Plan] = {}  # the ones planned last

    def pack(self, index: int) -> Ints:
        """Samples of one pack."""
        epoch = self._epoch_of(index)
        return self.plan(epoch)[index - self._starts[epoch]]

    def plan(self, epoch: int) -> Plan:
        """The plan of one epoch of the phase, from 0."""
        if epoch not in self._plans:
            while len(self._plans) >= _KEPT_PLANS:
                del self._plans[next(iter(self._plans))]
            drawn = None
            if self._mixture is not None:
                drawn = self._mixture.draw(self._phase, epoch, self.before)
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

    def sums(self, values: Sequence[Ints], packs: int) -> Ints:
        """Of the first `packs` packs of the phase: as of the whole run, [values, packs]."""
        parts: list[Ints] = []
        while packs > 0:
            plan = self.plan(len(parts))
            parts.append(np.stack([plan.sums(each)[:packs] for each in values]))
            packs -= parts[-1].shape[1]
        return np.concatenate(parts, axis=1)

    def state_after(self, packs: int) -> MixtureState:
        """What the run has taken after the first `packs` packs of the phase."""
        assert self._mixture is not None, "one source has one phase"
        epoch = self._epoch_of(packs)
        plan, inside = self.plan(epoch), packs - self._starts[epoch]
        begin, end = self._span(epoch)
        epochs = begin + (end - begin) * inside / len(plan)
        taken = plan.order[: plan.offsets[inside]]
        tokens = self._tokens[epoch] + int(self._lengths[taken].sum(dtype=int))
        amounts = np.array([share.amount for share in self._mixture.phases[self._phase]])
        deficit = self.before.deficit + (epochs - self.before.epochs) * amounts
        draw_counts = self.before.draw_counts.copy()
        whole = (self._mixture.draw(self._phase, e, self.before) for e in range(epoch))
        for drawn in chain([taken], whole):
            deficit -= self._mixture.amounts(drawn)
            draw_counts += np.bincount(drawn, minlength=len(draw_counts)).astype(draw_counts.dtype)
        return MixtureState(epochs, tokens, draw_counts, deficit)

    def after_epochs(self, epochs: float) -> int:
        """Packs until the run has `epochs`; of a part of an epoch, that part of its packs."""
        epoch = int(epochs) - int(self.before.epochs)
        begin, end = self._span(epoch)
        self._extend(epoch)
        part = (epochs - begin) / (end - begin)
        return self._starts[epoch] + (math.ceil(part * len(self.plan(epoch))) if part else 0)

    def after_tokens(self, tokens: int) -> int:
        """Packs until the run has `tokens`.

        Raises:
            ConfigError: that takes more passes than are ever meant, each of which is planned.
        """
        epoch_tokens = int(self._lengths[self.plan(0).order].sum(dtype=int))
        if tokens - self.before.tokens > MAX_PASSES * epoch_tokens:
            raise ConfigError(
                f"is {tokens}: more than {MAX_PASSES:,} passes over data of {epoch_tokens:,} "
                "tokens",
                where="train.tokens",
                fix="set fewer tokens, or train.steps",
            )
        while self._tokens[-1] < tokens:
            self._extend(len(self._starts))
        epoch = bisect_right(self._tokens, tokens - 1) - 1
        reached = self._tokens[epoch] + np.cumsum(self.plan(epoch).sums(self._lengths))
        return self._starts[epoch] + int(np.searchsorted(reached, tokens)) + 1

    def _span(self, epoch: int) -> tuple[float, float]:
        """Epochs of the run before one of the phase, and after it: the first may be a rest."""
        begin = int(self.before.epochs) + epoch
        return max(begin, self.before.epochs), begin + 1

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
