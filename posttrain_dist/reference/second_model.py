"""A second model beside the policy: a frozen copy of its start, or another model folder."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch

from posttrain_dist.build import make_policy, on_nf4
from posttrain_dist.config import RunConfig
from posttrain_dist.errors import ConfigError
from posttrain_dist.flow import Batch
from posttrain_dist.models import Checkpointing, Weights
from posttrain_dist.models.architectures.dropout import switch_off_dropout
from posttrain_dist.models.folder import load_tokenizer, read_shape, resolve
from posttrain_dist.models.load import load_model
from posttrain_dist.models.policy import Policy
from posttrain_dist.objectives.reference_choice import Referenced
from posttrain_dist.reference.log_probs import log_probs
from posttrain_dist.tuning.adapters import adapter_folder
from posttrain_dist.tuning.full import Full

_KEY = "objective.reference_model"


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


def check_named(config: RunConfig) -> None:
    """See that the named reference is a model, and has the tokens of the policy.

    Raises:
        ConfigError: it is an adapter, or has another tokenizer.
        ModelError: it has no tokenizer.
    """
    objective = config.objective
    assert isinstance(objective, Referenced) and objective.reference_model is not None
    folder = Path(objective.reference_model).expanduser()
    if (folder / adapter_folder.CONFIG).is_file():
        continued = getattr(config.tuning, "init_from", None)
        own = continued is not None and Path(continued).resolve() == folder.resolve()
        raise ConfigError(
            f"{folder} is an adapter"
            + (", the one that is trained on: it cannot be its own reference" if own else ""),
            where=_KEY,
            fix="leave it out: the reference is then what training starts with"
            if own
            else f"write it into a model first: posttrain export {folder} OUT --merge",
        )
    named = resolve(objective.reference_model)
    own_ids = _ids(resolve(config.model.path), config.model.add_tokens)
    ids = _ids(named, ())
    if ids != own_ids:
        differ = [token for token in {**own_ids, **ids} if ids.get(token) != own_ids.get(token)]
        raise ConfigError(
            f"{named} has another tokenizer than the policy: {len(differ)} tokens differ, such as "
            f"{differ[0]!r}, {_said(own_ids.get(differ[0]))} of the policy and "
            f"{_said(ids.get(differ[0]))} of the reference",
            where=_KEY,
            fix="name a model with the same tokenizer, such as the one that the policy was made of",
        )
    vocab_size = read_shape(str(named)).vocab_size
    if own_ids and max(own_ids.values()) >= vocab_size:
        raise ConfigError(
            f"{named} has a vocab_size of {vocab_size}, and the tokenizer gives ids up to "
            f"{max(own_ids.values())}",
            where=_KEY,
            fix="name a model that has embeddings of all of these tokens",
        )


def _ids(folder: Path, add_tokens: Sequence[str]) -> dict[str, int]:
    """Token -> id of a tokenizer, of its special ones too."""
    backend = load_tokenizer(folder, add_tokens=add_tokens).backend_tokenizer
    found: dict[str, int] = backend.get_vocab(with_added_tokens=True)
    return found


def _said(token_id: int | None) -> str:
    return "no token" if token_id is None else f"id {token_id}"


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
