"""A second model beside the policy: a frozen copy of its start, or another model folder."""

from __future__ import annotations

from dataclasses import replace

import torch

from posttrain_dist.build import load_tuned, make_engine, make_policy
from posttrain_dist.config import RunConfig
from posttrain_dist.data.packs.collate import filler
from posttrain_dist.dist import Process
from posttrain_dist.flow import Batch
from posttrain_dist.models import Checkpointing, Weights
from posttrain_dist.models.finite import refuse_nonfinite
from posttrain_dist.models.folder import resolve
from posttrain_dist.objectives.reference_choice import Referenced
from posttrain_dist.reference.log_probs import log_probs
from posttrain_dist.tuning.full import Full


class SecondModel:
    """A frozen model beside the policy, in an engine of its own: ZeRO-3 shards it, too.

    It is what `objective.reference_model` names, else what training starts with, made once more.
    """

    def __init__(
        self, config: RunConfig, process: Process, dtype: torch.dtype, num_channels: int
    ) -> None:
        config = _config_of(config)
        self._engine = make_engine(config, process, dtype)
        model = load_tuned(config, self._engine, dtype)
        policy = make_policy(model, num_channels, config.tuning)
        self._engine.attach_frozen(policy)
        if config.model.weights is Weights.load:
            refuse_nonfinite(policy, resolve(config.model.path), prefix="causal_lm.")
        self._engine.train(False)
        # In its first forward ZeRO-3 finds out which modules read the weights of others.
        self.score(filler(config.objective).to(self._engine.device))

    def score(self, batch: Batch) -> torch.Tensor:
        """See `log_probs`."""
        return log_probs(self._engine.forward, batch)


def _config_of(config: RunConfig) -> RunConfig:
    """The config of a run whose start the second model is."""
    objective = config.objective
    assert isinstance(objective, Referenced)
    # No backward, so that nothing is computed again.
    model = replace(
        config.model,
        activation_checkpointing=Checkpointing.none,
        checkpoint_layers=None,
        checkpoint_offload=False,
    )
    if objective.reference_model is None:
        return replace(config, model=model)
    named = replace(model, path=objective.reference_model, weights=Weights.load, add_tokens=[])
    return replace(config, model=named, tuning=Full())
