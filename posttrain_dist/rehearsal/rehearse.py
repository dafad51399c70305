"""The rehearsal: before step 1 the heaviest batch, an update, an evaluation and a save.

Memory that is missing at hour six is missing here already: what comes later repeats what was done.
All of it is undone to the last bit, at no cost in memory. Each loss is multiplied by zero and the
learning rate is zero, so that gradients and moments are zeros of their full size and every weight
stays as it is; what an update leaves else, its count, the engine puts back.

A run that goes on from a checkpoint is not rehearsed: moments that are not zero would not stay,
and it has been through every phase before.
"""

from __future__ import annotations

import contextlib
import logging
import math
import random
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from posttrain_dist import dist
from posttrain_dist.checkpoint import store
from posttrain_dist.checkpoint.manifest import Manifest
from posttrain_dist.checkpoint.save_times import timed_save
from posttrain_dist.checkpoint.trained_state import state_writer
from posttrain_dist.config import RunConfig
from posttrain_dist.data.packs.collate import filler
from posttrain_dist.data.packs.heaviest import RowMemory
from posttrain_dist.data.packs.prefetch import RunSource
from posttrain_dist.engine.base import TrainEngine
from posttrain_dist.errors import TrainingError
from posttrain_dist.flow import Batch
from posttrain_dist.loop import Meter, evaluate
from posttrain_dist.metrics.memory_use import memory_bytes
from posttrain_dist.models import Attention
from posttrain_dist.models.folder import read_shape
from posttrain_dist.planner.make_job import row_memory
from posttrain_dist.planner.plan_file import read_plan

FOLDER = "rehearsal"  # in the run folder, while a checkpoint is tried
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Rehearsal:
    """What a rehearsal is done with; all of it is that of the run.

    Attributes:
        heldout: whose first batch is evaluated; None: there is none.
        meter: of training and evaluation; empty before, and emptied again.
    """

    config: RunConfig
    run_folder: Path
    engine: TrainEngine
    source: RunSource
    heldout: RunSource | None
    meter: Meter
    manifest: Manifest

    def run(self, start: int, steps: int) -> None:
        """Try what takes most memory in a run of `steps`, and undo it; collective.

        Does nothing where the config does not ask for it, or the run goes on from step `start`.

        Raises:
            TrainingError: the loss of the heaviest batch, or its gradient, is not finite.
            CheckpointError: a checkpoint cannot be written.
        """
        if start or not self.config.train.rehearse:
            return
        began, device = time.monotonic(), self.engine.device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        with _random_states_kept(device):
            heaviest = self.source.heaviest(steps, _row_memory(self.config))
            # An update by next to nothing first: from the second step on there are moments.
            for batches in ([filler(self.config.objective)], *heaviest):
                self._update([batch.to(device) for batch in batches])
            if self.heldout is not None:
                first = islice(self.heldout.eval_batches(), 1)
                evaluate(self.engine, first, self.config.objective, self.meter)
            self._save()
            self.engine.forget_updates()
        self.meter.flush()
        self.engine.train(False)
        self._report(memory_bytes(device), heaviest, time.monotonic() - began)
        if device.type == "cuda":  # so that the reported peak is that of training
            torch.cuda.reset_peak_memory_stats(device)

    def _update(self, batches: Sequence[Batch]) -> None:
        objective = self.config.objective
        self.engine.train(True)
        for i, batch in enumerate(batches):
            count = objective.count(batch)
            loss = self.engine.forward(batch, objective, count._make([1.0] * len(count)))
            self.engine.backward(loss.total * 0.0, last=i == len(batches) - 1)
            self.meter.add(loss, batch)
        if not math.isfinite(float(self.engine.step(0.0))):
            ids = sorted({i for batch in batches for i in batch.sample_id_S})
            shown = ", ".join(map(str, ids[:8])) + (" ..." if len(ids) > 8 else "")
            raise TrainingError(
                f"the gradient of the heaviest batch (samples {shown}) is not finite",
                where="step 0, the rehearsal",
                fix="try train.dtype=float32, look at these samples, and see that the model "
                "answers before it is trained",
            )

    def _save(self) -> None:
        """Write a checkpoint to the disk that takes those of the run, and remove it."""
        folder, engine, tuning = self.run_folder / FOLDER, self.engine, self.config.tuning
        manifest = replace(self.manifest, step=0)
        dist.on_main(lambda: shutil.rmtree(folder, ignore_errors=True))  # of a start that died
        try:
            with timed_save(self.run_folder):
                store.save(folder, manifest, state_writer(engine, tuning, 0), keep=0)
        finally:
            if dist.rank() == 0:  # alone: where it failed, the others may be gone
                shutil.rmtree(folder, ignore_errors=True)

    def _report(self, peak_bytes: int, heaviest: list[list[Batch]], seconds: float) -> None:
        tokens = max(batch.num_tokens for batches in heaviest for batch in batches)
        planned = read_plan(self.run_folder).get("plan", {}).get("device", {})
        expected = planned.get("allocated_bytes")
        on_gpu = self.engine.device.type == "cuda"
        _log.info(
            "rehearsed the heaviest batch (%d tokens), an update and a save in %.1f s: a rank "
            "%s %.3f GiB%s",
            tokens,
            seconds,
            "allocated at most" if on_gpu else "holds, with its libraries,",
            peak_bytes / 2**30,
            f"; {expected / 2**30:.3f} GiB of tensors were planned" if expected else "",
        )


def _row_memory(config: RunConfig) -> RowMemory:
    """What may be kept of a row: of attentions that may run, by that which keeps most."""
    attention = "eager" if config.model.attention is Attention.eager else "sdpa"
    shape = read_shape(config.model.path)
    return row_memory(config.tuning, shape, attention, config.data.max_length)


@contextlib.contextmanager
def _random_states_kept(device: torch.device) -> Iterator[None]:
    """Every generator goes on afterwards as if nothing had been drawn."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield
    random.setstate(python)
    np.random.set_state(numpy)
