"""What a training needs of its reference, made in one place: batches, identity, start check."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from posttrain_dist import dist
from posttrain_dist.build import PreparedData, make_source
from posttrain_dist.checkpoint.manifest import Manifest
from posttrain_dist.config import RunConfig
from posttrain_dist.config.reference_rules import (
    check_named_reference,
    chosen_reference,
    is_start,
    reference_line,
)
from posttrain_dist.data.packs.loader import PackedSource
from posttrain_dist.data.packs.prefetch import RunSource
from posttrain_dist.data.prepared.arrays import Examples
from posttrain_dist.dist import Process
from posttrain_dist.engine.base import TrainEngine
from posttrain_dist.flow import Batch
from posttrain_dist.logs import notify
from posttrain_dist.models.policy import Policy
from posttrain_dist.objectives.reference_choice import (
    OLD_LOGPROB,
    REF_LOGPROB,
    Reference,
    Referenced,
)
from posttrain_dist.reference.identity import array_key, reference_digest
from posttrain_dist.reference.kept_log_probs import StoredLogProbs
from posttrain_dist.reference.live import FilledSource
from posttrain_dist.reference.log_probs import Score, log_probs
from posttrain_dist.reference.precomputed import complete
from posttrain_dist.reference.second_model import SecondModel
from posttrain_dist.reference.start_check import check_start
from posttrain_dist.tuning.lora import Lora

FOLDER = "reference"  # in the run folder
_PART_TOKENS = 1 << 17  # of a part of the pass, at least
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Worker:
    """One worker of a run before its first step: the start weights are loaded.

    Attributes:
        cache: folder where prepared data is kept.
    """

    config: RunConfig
    run_folder: Path
    process: Process
    engine: TrainEngine
    policy: Policy
    dtype: torch.dtype
    data: PreparedData
    cache: Path


@dataclass(frozen=True, slots=True)
class RunReference:
    """The batches of a run with all that its objective needs of models.

    Attributes:
        source: of the steps.
        heldout: of the evaluation; None: there are no held-out rows.
        digest: what the reference is; empty: there is none.
    """

    worker: Worker
    source: RunSource
    heldout: RunSource | None
    digest: str = ""

    def recorded_in(self, manifest: Manifest) -> Manifest:
        """The manifest of the run's checkpoints, with what the reference is."""
        if not self.digest:
            return manifest
        lineage = {**manifest.lineage, "reference_digest": self.digest}
        return replace(manifest, lineage=lineage)

    def check_start(self, step: int) -> None:
        """Before step 1, see that the policy is its reference; collective.

        Raises:
            TrainingError: it is not, and the reference is to be what training starts with.
        """
        worker = self.worker
        config, objective = worker.config, worker.config.objective
        if step > 1 or not isinstance(objective, Referenced) or not is_start(config):
            return
        batch: Batch = self.source.step(1)[0].to(worker.engine.device)
        exact = _is_exact(config, worker)
        found = check_start(worker.engine, objective, batch, worker.dtype, exact=exact)
        _log.info("policy and reference differ on the first batch by %.1e at most", found)

    def close(self) -> None:
        """End what makes batches ahead."""
        for source in (self.source, self.heldout):
            if isinstance(source, FilledSource):
                source.close()


def open_reference(
    worker: Worker, source: PackedSource, heldout: PackedSource | None, steps: int
) -> RunReference:
    """Have the fields that models fill in every batch of a run of `steps`; collective.

    A reference that is computed before step 1 is computed here, by the weights that are loaded:
    before those of a checkpoint are.

    Raises:
        ConfigError, ModelError: the reference that is named cannot be used.
        DataError: its log-probabilities cannot be written.
    """
    config = worker.config
    names = {field.name for field in config.objective.extra}
    fills: dict[str, Score] = {}
    digest = ""
    if REF_LOGPROB.name in names:
        assert isinstance(config.objective, Referenced)
        dist.on_main(lambda: check_named_reference(config))
        digest = dist.from_main(lambda: reference_digest(config))
        _say(worker, reference_line(config))
        choice = chosen_reference(config)
        if choice is Reference.precomputed:
            _precompute(worker, digest, source, steps)
        elif choice is Reference.frozen:
            fills[REF_LOGPROB.name] = _second_model(worker).score
        else:
            fills[REF_LOGPROB.name] = partial(_score_base, worker)
    if OLD_LOGPROB.name in names:
        fills[OLD_LOGPROB.name] = partial(_score_policy, worker)
    if not fills:
        return RunReference(worker, source, heldout, digest)
    device = worker.engine.device
    filled = FilledSource(source, fills, device, steps)
    filled_heldout = FilledSource(heldout, fills, device, 0) if heldout else None
    return RunReference(worker, filled, filled_heldout, digest)


def _score_policy(worker: Worker, batch: Batch) -> torch.Tensor:
    worker.engine.train(False)
    return log_probs(worker.engine.forward, batch)


def _score_base(worker: Worker, batch: Batch) -> torch.Tensor:
    with worker.policy.base():
        return _score_policy(worker, batch)


def _second_model(worker: Worker) -> SecondModel:
    channels = len(worker.data.channels)
    return SecondModel(worker.config, worker.process, worker.dtype, channels)


def _precompute(worker: Worker, digest: str, source: PackedSource, steps: int) -> None:
    """Give every sample that the run meets its log-probabilities."""
    config, data = worker.config, worker.data
    assert isinstance(config.objective, Referenced)
    key = array_key(config, digest, data.fingerprint, worker.dtype)
    every = Examples.open(worker.run_folder / "prepared", "all", data.channels)
    stored = StoredLogProbs(worker.run_folder / FOLDER, key, every.num_stored_tokens, len(every))
    cached = worker.cache / "references" / key
    if dist.from_main(lambda: stored.restore(cached)):
        _say(worker, "log-probabilities of the reference: as an earlier run computed them")
    score: Callable[[], Score] = lambda: partial(_score_policy, worker)  # noqa: E731
    if not is_start(config):
        score = lambda: _second_model(worker).score  # noqa: E731
    complete(
        stored,
        every.subset(_needed(data, source, steps)),
        score,
        lambda examples: make_source(config, examples, worker.process, mixed=False),
        worker.engine.device,
        # Some packs for every rank in each part.
        part_tokens=max(_PART_TOKENS, 8 * worker.process.world * config.data.max_length),
        say=partial(_say, worker),
    )
    dist.on_main(lambda: stored.finish(cached))
    gc.collect()  # a second model, whose modules refer to each other
    if worker.engine.device.type == "cuda":
        torch.cuda.empty_cache()
    for examples in (data.train, data.heldout):
        examples.add_token_field("ref_logprob_L", stored.values())


def _needed(
    data: PreparedData, source: PackedSource, steps: int
) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Places of the samples that the run draws, and of the held-out ones."""
    units, drawn = data.train.units, source.drawn_units(steps)
    sizes = np.diff(units.first)
    trained = data.train.places[np.repeat(drawn, sizes)]
    return np.union1d(trained, data.heldout.places)


def _say(worker: Worker, line: str) -> None:
    if dist.rank() == 0:
        notify(worker.run_folder, line)


def _is_exact(config: RunConfig, worker: Worker) -> bool:
    """Whether an adapter that does nothing yet leaves every bit: DoRA divides by a norm, and with
    the head adapted its product has other sizes.
    """
    choice = chosen_reference(config)
    if worker.dtype is not torch.float32 or choice is Reference.precomputed:
        return False
    if choice is Reference.frozen and not config.tuning.begins_as_base:
        return False  # what is inserted is made twice
    if isinstance(config.tuning, Lora):
        return not config.tuning.dora and not hasattr(worker.policy.head.module, "base_layer")
    return True
