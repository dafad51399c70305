"""The training loop. Read this file second, after flow.py.

It names no objective, no engine and no sink: it fetches, counts, goes forward and backward,
steps, and calls hooks. A generator, so that a test can take it step by step.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from enum import IntEnum
from typing import Any, Protocol

import torch

from posttrain_dist import dist
from posttrain_dist.data.packs.prefetch import Prefetcher, Source
from posttrain_dist.errors import DataError
from posttrain_dist.flow import Batch, StepInfo


class Stop(IntEnum):
    """Why a run ends before its last step."""

    none = 0
    requested = 1  # by a signal or a file STOP: it can go on later
    early = 2  # by the diagnosis: more steps gain nothing


class Meter(Protocol):
    """Adds up micro-batches and turns them into metrics."""

    def add(self, loss: Any, batch: Batch) -> None:
        """Take in one micro-batch of this rank."""

    def flush(self) -> tuple[Any, int]:
        """The global table of sums and the token count since the last flush."""


def fit(
    *,
    engine: Any,
    source: Source,
    objective: Any,
    meter: Meter,
    describe: Callable[[Any], dict[str, float]],
    learning_rate: Callable[[int], float],
    steps: int,
    start: int = 0,
    seed: int = 0,
    log_every: tuple[int, ...] = (1,),
    stop_requested: Callable[[], Stop] = lambda: Stop.none,
    hooks: Sequence[Callable[[StepInfo], None]] = (),
) -> Iterator[StepInfo]:
    """Train from update `start` to `steps`; yields every step after its hooks ran.

    Args:
        describe: what the meter flushed -> metrics.
        learning_rate: update (from 1) -> rate.
        log_every: a step that is a multiple of any of these is logged.
        stop_requested: called on rank 0 once a step; the run ends after that step.

    Raises:
        DataError: a step has no supervised token.
    """
    if start == 0:
        yield _run_hooks(hooks, StepInfo(step=0))
    window_start = time.perf_counter()
    norms: list[torch.Tensor | float] = []  # of the updates since the last logged one
    with Prefetcher(source, engine.device, steps) as prefetched:
        for step in range(start + 1, steps + 1):
            batches = prefetched.step(step)
            # Each step is seeded by itself, so that a resumed run draws the same dropout.
            torch.manual_seed(hash((seed, step, dist.rank())) & 0x7FFFFFFF)
            for batch in batches:
                objective.check_extra(batch)
            counts = [objective.count(batch) for batch in batches]
            denominators, stop = _reduce(counts, stop_requested)
            if not any(value > 0 for value in denominators):
                raise DataError(f"step {step} has no supervised token", where="data.train")
            engine.train(True)
            for i, batch in enumerate(batches):
                loss = engine.forward(batch, objective, denominators)
                engine.backward(loss.total, last=i == len(batches) - 1)
                meter.add(loss, batch)
            lr = learning_rate(step)
            norms.append(engine.step(lr))

            info = StepInfo(step, last=step == steps or stop is not Stop.none)
            info.stopped = stop is Stop.requested and step < steps
            if info.last or any(step % every == 0 for every in log_every):
                # Only now does the host wait for the device.
                info.nonfinite_step, norm = _first_nonfinite(norms, step)
                info.last = info.last or info.nonfinite_step > 0
                table, tokens = meter.flush()
                now = time.perf_counter()
                info.metrics = {**describe(table), "train/lr": lr, "train/grad_norm": norm}
                info.metrics["train/tokens_per_s"] = tokens / (now - window_start)
                norms, window_start = [], now
            paused = time.perf_counter()
            yield _run_hooks(hooks, info)
            window_start += time.perf_counter() - paused  # hooks are not training
            if info.last:
                return


def _reduce(
    counts: list[Any], stop_requested: Callable[[], Stop] = lambda: Stop.none
) -> tuple[Any, Stop]:
    """Each loss component's global denominator, and rank 0's stop request: one reduction."""
    sums = [sum(values) for values in zip(*counts, strict=True)]
    stop = float(stop_requested()) if dist.rank() == 0 else 0.0
    # Numbers of the host, which avoids a device sync.
    reduced = dist.all_sum(torch.tensor([*sums, stop], dtype=torch.float64)).tolist()
    return counts[0]._make(reduced[:-1]), Stop(round(reduced[-1]))


def _first_nonfinite(norms: list[torch.Tensor | float], step: int) -> tuple[int, float]:
    """The first update with a gradient that is not finite (0: none), and the last norm."""
    known = [float(norm) for norm in norms]
    lost = [i for i, norm in enumerate(known) if not math.isfinite(norm)]
    return step - len(known) + 1 + lost[0] if lost else 0, known[-1]


def _run_hooks(hooks: Sequence[Callable[[StepInfo], None]], info: StepInfo) -> StepInfo:
    for hook in hooks:
        hook(info)
    return info


def evaluate(engine: Any, batches: Iterable[Batch], objective: Any, meter: Meter) -> Any:
    """What `meter` flushes over `batches`, without gradients; collective."""
    engine.train(False)
    with torch.no_grad():
        whole = None
        if objective.counts_evaluation:
            batches = list(batches)
            whole, _ = _reduce([objective.count(each.to(engine.device)) for each in batches])
        for batch in batches:
            batch = batch.to(engine.device)
            objective.check_extra(batch)
            counts = objective.count(batch) if whole is None else whole
            denominators = objective.evaluation_denominators(counts)
            meter.add(engine.forward(batch, objective, denominators), batch)
    table, _ = meter.flush()
    return table
