"""A second model beside the policy: a frozen copy of its start, or another model folder."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

import torch

from posttrain_dist.build import make_policy, on_nf4
from posttrain_dist.config import RunConfig
from posttrain_dist.flow import Batch
from posttrain_dist.models import Checkpointing, Weights
from posttrain_dist.models.architectures.dropout import switch_off_dropout
from posttrain_dist.models.folder import resolve
from posttrain_dist.models.load import load_model
from posttrain_dist.models.policy import Policy
from posttrain_dist.objectives.reference_choice import Referenced
from posttrain_dist.reference.log_probs import log_probs
from posttrain_dist.tuning.full import Full


class SecondModel:
    """A frozen model on the device of this rank, which holds all of it.

    It is what `objective.reference_model` names, else what training starts with, made once more.
    """

    def __init__(
        self, config: RunConfig, device: torch.device, dtype: torch.dtype, num_channels: int
    ) -> None:
        policy = _build(_config_of(config), device, dtype, num_channels)
        self._policy = policy.requires_grad_(False).to(device).eval()

    def score(self, batch: Batch) -> torch.Tensor:
        """See `log_probs`."""
        return log_probs(self._policy, batch)


def _config_of(config: RunConfig) -> RunConfig:
    """The config of a run whose start the second model is."""
    objective = config.objective
    assert isinstance(objective, Referenced)
    # No backward, so that nothing is computed again.
    model = replace(
        config.model, activation_checkpointing=Checkpointing.none, checkpoint_layers=None
    )
    if objective.reference_model is None:
        return replace(config, model=model)
    named = replace(model, path=objective.reference_model, weights=Weights.load, add_tokens=[])
    return replace(config, model=named, tuning=Full())


def _build(
    config: RunConfig, device: torch.device, dtype: torch.dtype, num_channels: int
) -> Policy:
    folder = resolve(config.model.path)
    model = load_model(
        config.model,
        folder,
        dtype=dtype,
        seed=config.seed,
        materialise=nullcontext(),
        attach=config.tuning.attach,
        nf4=on_nf4(config, folder),
        device=device,
    )
    switch_off_dropout(model)
    return make_policy(model, num_channels, config.tuning)
