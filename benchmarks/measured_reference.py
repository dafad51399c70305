"""Fields of a batch that models fill, for `measured_memory.py`: as `reference/` has them filled."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from posttrain_dist.config import RunConfig
from posttrain_dist.config.reference_rules import chosen_reference
from posttrain_dist.dist import Process
from posttrain_dist.flow import Batch
from posttrain_dist.objectives.reference_choice import (
    OLD_LOGPROB,
    REF_LOGPROB,
    Reference,
    Referenced,
)
from posttrain_dist.reference.log_probs import Score, log_probs
from posttrain_dist.reference.second_model import SecondModel


def scores_of(
    config: RunConfig,
    process: Process,
    engine: Any,
    policy: Any,
    dtype: torch.dtype,
    num_channels: int,
) -> tuple[dict[str, Score], dict[str, Score]]:
    """By the name of the field: what fills it before step 1, and what fills it in each step."""
    before: dict[str, Score] = {}
    live: dict[str, Score] = {}
    objective = config.objective
    if isinstance(objective, Referenced):
        choice = chosen_reference(config)
        if choice is Reference.frozen:
            second = SecondModel(config, process, dtype, num_channels)
            live[REF_LOGPROB.name] = second.score
        elif choice is Reference.adapter_off:
            live[REF_LOGPROB.name] = partial(_base, engine, policy)
        else:
            before[REF_LOGPROB.name] = partial(_policy, engine)
    if OLD_LOGPROB in objective.extra:
        live[OLD_LOGPROB.name] = partial(_policy, engine)
    return before, live


def fill(batch: Batch, scores: Mapping[str, Score]) -> None:
    """Fill those fields of a batch."""
    for name, score in scores.items():
        batch.extra[name] = score(batch)


def _policy(engine: Any, batch: Batch) -> torch.Tensor:
    engine.train(False)
    return log_probs(engine.forward, batch)


def _base(engine: Any, policy: Any, batch: Batch) -> torch.Tensor:
    with policy.base():
        return _policy(engine, batch)
