"""What happens after a step: evaluate, log, save, give up; one small class each.

The loop calls every hook after every step, in their order; a hook knows itself when it is due.
What `Evaluate` adds to the step's metrics is logged by `Log`, which comes after it, and a save
comes after that, so that what is logged of a step is never newer than its checkpoint.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

from posttrain_dist import dist
from posttrain_dist.checkpoint import store
from posttrain_dist.checkpoint.manifest import Manifest
from posttrain_dist.checkpoint.save_times import timed_save
from posttrain_dist.checkpoint.trained_state import state_writer
from posttrain_dist.config import RunConfig
from posttrain_dist.data.packs.loader import PackedSource
from posttrain_dist.data.packs.prefetch import RunSource
from posttrain_dist.diagnosis.facts import ModelFacts
from posttrain_dist.diagnosis.monitor import Monitor
from posttrain_dist.engine.base import TrainEngine
from posttrain_dist.errors import PosttrainError, TrainingError, raise_all
from posttrain_dist.files import read_object, read_rows
from posttrain_dist.flow import StepInfo
from posttrain_dist.loop import Stop, evaluate
from posttrain_dist.metrics.memory_use import memory_bytes
from posttrain_dist.metrics.sinks import JsonlSink, SampleLog, Sink
from posttrain_dist.metrics.special_tokens import TokenMeter
from posttrain_dist.metrics.wandb_sink import WandbSink, resolve_mode


class Evaluate:
    """The loss of the held-out rows: before training, every `every` steps, and at the end.

    Args:
        source: of the held-out rows; None: there are none.
        every: steps; None: before training and at the end only.
        draw: called with the step and the channel table of each evaluation.
    """

    def __init__(
        self,
        engine: TrainEngine,
        source: RunSource | None,
        objective: Any,
        meter: TokenMeter,
        every: int | None,
        draw: Callable[[int, Any], None] = lambda step, table: None,
    ) -> None:
        self._engine, self._source, self._objective = engine, source, objective
        self._meter, self._every, self._draw = meter, every, draw

    def __call__(self, info: StepInfo) -> None:
        """Add `eval/...` to the metrics of a step that is due; collective."""
        regular = self._every is not None and info.step % self._every == 0
        if self._source is None or not (regular or info.step == 0 or info.last):
            return
        if info.stopped or info.nonfinite_step:
            return  # someone waits for the run to end
        batches = self._source.eval_batches()
        tables = evaluate(self._engine, batches, self._objective, self._meter)
        info.metrics.update(self._meter.eval_metrics(tables))
        self._draw(info.step, tables.channels_CK)


class Log:
    """Every step's numbers to metrics.jsonl, samples.log and W&B, and to the diagnosis.

    Sinks and diagnosis are on rank 0 alone; a run that goes on continues their files. A context:
    leaving it closes all of them. What the disk refused to the end is an error then, unless another
    one ends the training.

    Args:
        facts: what the diagnosis knows of the run beside its numbers.
        start: step of the checkpoint that the run goes on from; 0: none.
    """

    def __init__(
        self,
        config: RunConfig,
        run_folder: Path,
        engine: TrainEngine,
        source: PackedSource,
        facts: ModelFacts,
        start: int,
    ) -> None:
        self._engine, self._source = engine, source
        self._began = time.time()
        self._amounts: Counter[str] = Counter()  # drawn from each source in the whole run
        self._amount_key = f"source_{config.data.mix_by.name}"
        self.monitor: Monitor | None = None
        self._sinks: list[Sink] = []
        self._wandb: WandbSink | None = None
        dist.on_main(lambda: self._open(config, run_folder, facts, start))

    def __call__(self, info: StepInfo) -> None:
        """Complete the metrics of a step and write it; collective."""
        if info.metrics:
            info.metrics["system/memory_bytes"] = memory_bytes(self._engine.device)
        if dist.rank() != 0:
            return
        if info.step:
            self._amounts.update(self._source.source_amounts(info.step))
            info.sample_ids = self._source.sample_ids(info.step)
        if info.metrics:
            total = sum(self._amounts.values())
            for name, amount in self._amounts.items():
                info.metrics[f"{self._amount_key}/{name}"] = amount
                info.metrics[f"source_share/{name}"] = amount / total
            info.metrics["time_s"] = time.time() - self._began
            if self.monitor is not None:
                self.monitor.observe(info)
        for sink in self._sinks:
            sink.write(info)

    def stop_requested(self) -> Stop:
        """Whether the diagnosis ends the run; on rank 0."""
        stop = self.monitor is not None and self.monitor.stop is not None
        return Stop.early if stop else Stop.none

    def __enter__(self) -> Log:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        faults: list[PosttrainError] = []
        closes = [each.close for each in self._sinks]
        closes += [self.monitor.close] if self.monitor is not None else []
        for close in closes:
            try:
                close()
            except PosttrainError as fault:
                faults.append(fault)
        if self._wandb is not None:
            self._wandb.close()  # after metrics.jsonl, which it reads
        if error is None:
            raise_all(faults)

    def _open(self, config: RunConfig, folder: Path, facts: ModelFacts, start: int) -> None:
        self.monitor = Monitor(config.diagnose, facts, folder, start)
        rows = folder / "metrics.jsonl"
        self._sinks = [JsonlSink(rows, start), SampleLog(folder / "samples.log", start)]
        for row in read_rows(rows)[-1:] if start else []:
            self._began -= row.get("time_s", 0.0)
            for key, value in row.items():
                if key.startswith(f"{self._amount_key}/"):
                    self._amounts[key.partition("/")[2]] = value
        mode = resolve_mode(config.logging.wandb)
        if mode != "off":
            lineage = read_object(folder / "run.json")
            self._wandb = WandbSink(
                config.logging,
                folder,
                mode=mode,
                run_id=lineage.get("wandb_id", folder.name),
                name=f"{config.name}-{folder.name}",
                start_step=start,
                details={**config.to_dict(), "lineage": lineage},
            )


class Save:
    """A checkpoint every `train.save_every` steps and at the end.

    Args:
        manifest: of this run; each checkpoint has its step and lineage filled in.
        log: whose diagnosis knows the step of the best evaluation, which is kept.
    """

    def __init__(
        self,
        config: RunConfig,
        run_folder: Path,
        engine: TrainEngine,
        manifest: Manifest,
        log: Log,
    ) -> None:
        self._folder, self._engine, self._manifest, self._log = run_folder, engine, manifest, log
        self._every, self._keep = config.train.save_every, config.checkpoint.keep
        self._tuning = config.tuning

    def __call__(self, info: StepInfo) -> None:
        """Write the checkpoint of a step that is due; collective."""
        regular = self._every is not None and info.step % self._every == 0
        if info.step == 0 or not (regular or info.last):
            return
        if info.nonfinite_step:
            return  # and no good checkpoint is pruned for it
        lineage = {**self._manifest.lineage, **read_object(self._folder / "run.json")}
        manifest = replace(self._manifest, step=info.step, lineage=lineage)
        monitor = self._log.monitor
        best = monitor.best_step if monitor is not None else None
        write = state_writer(self._engine, self._tuning, info.step)
        with timed_save(self._folder):
            store.save(self._folder, manifest, write, keep=self._keep, best=best)


class EndOnNonfinite:
    """Ends a run whose gradient was not finite: its weights are lost."""

    def __init__(self, run_folder: Path) -> None:
        self._folder = run_folder

    def __call__(self, info: StepInfo) -> None:
        """Look at one step.

        Raises:
            TrainingError: an update since the last logged step was not finite.
        """
        if not info.nonfinite_step:
            return
        whole = store.whole_checkpoints(self._folder)
        again = (
            f"`posttrain run {self._folder}` goes on from {whole[-1]}" if whole else "start again"
        )
        first = "; try train.dtype=float32" if info.nonfinite_step <= 1 else ""
        raise TrainingError(
            "the gradient is not finite, so the weights are lost; nothing of this step is saved",
            where=f"step {info.nonfinite_step}",
            fix=f"{again}; give it optimizer.lr=<half of it>, keep optimizer.clip above 0{first}; "
            "the rows of this step are in samples.log",
        )
