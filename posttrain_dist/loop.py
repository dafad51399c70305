"""The training loop. Read this file second, after flow.py.

It names no objective, no engine and no sink: it fetches, counts, goes forward and backward,
steps, and calls hooks. A generator, so that a test can take it step by step.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from posttrain_dist import dist
from posttrain_dist.data.packs.prefetch import Prefetcher, Source
from posttrain_dist.errors import DataError
from posttrain_dist.flow import Batch, StepInfo

GO_ON, LEAVE, END_EARLY = 0, 1, 2  # someone asked to leave; nothing more is to be gained


class Meter(Protocol):
    """Adds up micro-batches and turns them into metrics."""

    def add(self, loss: Any, batch: Batch) -> None:
        """Take in one micro-batch of this rank."""

    def flush(self) -> tuple[Any, int]:
        """The global table of sums and the token count since the last flush."""


@dataclass(slots=True)
class Hook:
    """A function called after some steps: every `every` steps, and at the ends if asked."""

    run: Callable[[StepInfo], None]
    every: int | None = None
    at_start: bool = False  # at step 0, before training
    at_end: bool = False  # at the last step, also of a stopped run

    def due(self, info: StepInfo) -> bool:
        """Whether this hook is called after the step of `info`."""
        if info.step == 0:
            return self.at_start
        regular = self.every is not None and info.step % self.every == 0
        return regular or (self.at_end and info.last)


@dataclass(slots=True, kw_only=True)
class Fit:
    """Everything that one training needs.

    Attributes:
        steps: total optimizer updates; `start` of them are already done.
        learning_rate: update -> rate.
        describe: what the meter flushed -> metrics.
        stop_requested: asked on rank 0 once a step: GO_ON, or what ends the run after that step.
    """

    engine: Any
    source: Source
    objective: Any
    meter: Meter
    describe: Callable[[Any], dict[str, float]]
    learning_rate: Callable[[int], float]
    steps: int
    start: int = 0
    seed: int = 0
    log_every: tuple[int, ...] = (1,)  # a step that is a multiple of any of these is logged
    stop_requested: Callable[[], int] = lambda: GO_ON
    hooks: tuple[Hook, ...] = ()

    def run(self) -> Iterator[StepInfo]:
        """Train from `start` to `steps`; yields every step after its hooks ran.

        Raises:
            DataError: a step has no supervised token.
        """
        if self.start == 0:
            yield self._finish(StepInfo(step=0))
        with Prefetcher(self.source, self.engine.device, self.steps) as source:
            yield from self._train(source)

    def _train(self, source: Prefetcher) -> Iterator[StepInfo]:
        since = time.perf_counter()
        norms: list[torch.Tensor | float] = []  # of the updates since they were last looked at
        for step in range(self.start + 1, self.steps + 1):
            info, lr, norm = self._update(step, source.step(step))
            norms.append(norm)
            if info.last or any(step % every == 0 for every in self.log_every):
                # Only now does the host wait for the device.
                known = [float(norm) for norm in norms]
                norms.clear()
                lost = [i for i, norm in enumerate(known) if not math.isfinite(norm)]
                if lost:  # the same on all ranks
                    info.broken = step - len(known) + 1 + lost[0]
                    info.last = True
                table, tokens = self.meter.flush()
                seconds, since = time.perf_counter() - since, time.perf_counter()
                info.metrics = {
                    **self.describe(table),
                    "train/lr": lr,
                    "train/grad_norm": known[-1],
                    "train/tokens_per_s": tokens / seconds,
                }
            paused = time.perf_counter()
            yield self._finish(info)
            since += time.perf_counter() - paused  # hooks are not training
            if info.last:
                return

    def _update(
        self, step: int, batches: list[Batch]
    ) -> tuple[StepInfo, float, torch.Tensor | float]:
        # Each step is seeded by itself, so that a resumed run draws the same dropout.
        torch.manual_seed(hash((self.seed, step, dist.rank())) & 0x7FFFFFFF)
        for batch in batches:
            self.objective.check_extra(batch)
        denominators, wish = self._agree([self.objective.count(batch) for batch in batches])
        if max(denominators) <= 0:
            raise DataError(f"step {step} has no supervised token", where="data.train")
        self.engine.train(True)
        for i, batch in enumerate(batches):
            loss = self.engine.forward(batch, self.objective, denominators)
            self.engine.backward(loss.total, last=i == len(batches) - 1)
            self.meter.add(loss, batch)
        lr = self.learning_rate(step)
        norm = self.engine.step(lr)
        completed = step == self.steps
        stopped = wish == LEAVE and not completed
        info = StepInfo(step, last=completed or wish != GO_ON, stopped=stopped)
        return info, lr, norm

    def _agree(self, counts: list[Any]) -> tuple[Any, int]:
        """Global denominators, and rank 0's stop request, in one reduction."""
        request = float(self.stop_requested()) if dist.rank() == 0 else 0.0
        sums = [sum(component) for component in zip(*counts, strict=True)]
        # Numbers of the host: no device sync.
        everything = torch.tensor([*sums, request], dtype=torch.float64)
        *totals, stop = dist.all_sum(everything).tolist()
        return counts[0]._make(totals), round(stop)

    def _finish(self, info: StepInfo) -> StepInfo:
        for hook in self.hooks:
            if hook.due(info):
                hook.run(info)
        return info


def evaluate(engine: Any, batches: Iterable[Batch], objective: Any, meter: Meter) -> Any:
    """What `meter` flushes over `batches`, without gradients; collective."""
    engine.train(False)
    with torch.no_grad():
        for batch in batches:
            batch = batch.to(engine.device)
            objective.check_extra(batch)
            counts = objective.count(batch)
            loss = engine.forward(batch, objective, counts._make([1.0] * len(counts)))
            meter.add(loss, batch)
    table, _ = meter.flush()
    return table
