"""The held-out loss of several adapters on one loaded base model."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain_dist.config import RunConfig
from posttrain_dist.errors import ConfigError, ModelError, PosttrainError
from posttrain_dist.generation.adapter_places import BASE, find_named, nf4_notice, stood_on_nf4

if TYPE_CHECKING:
    import torch
    from torch import nn

    from posttrain_dist.flow import Batch, Loss
    from posttrain_dist.models.policy import Policy
    from posttrain_dist.objectives.base import Objective

_log = logging.getLogger(__name__)


def evaluate_adapters(
    config: RunConfig,
    prepared: Path,
    adapters: Mapping[str, Path],
    notice: Callable[[str], None] = _log.info,
) -> dict[str, dict[str, Any]]:
    """The loss of `config.model`, and of each adapter on it, on the held-out rows.

    The base is loaded once, in NF4 if all adapters were trained so. An adapter's modules are taken
    out again before the next one.

    Args:
        prepared: the folder that `posttrain_dist.prepare.prepare` wrote.
        adapters: name -> folder, of adapters, runs or ensembles of prompts.
        notice: called with what the user should know of them.

    Returns:
        name ("none": the base) -> what `heldout.evaluate` returns. An ensemble NAME gives NAME-0
        and so on, "NAME average" (of their probabilities) and "NAME vote" (accuracies alone).

    Raises:
        ModelError: a folder cannot be loaded, or an adapter is for another base model.
        ConfigError: a name is taken, or model.add_tokens is not that of an adapter.
    """
    from posttrain_dist.evaluation.ensemble import evaluate_ensemble
    from posttrain_dist.evaluation.restored_model import restored
    from posttrain_dist.models.embeddings.added_tokens import forget_added
    from posttrain_dist.models.folder import resolve
    from posttrain_dist.tuning.adapters.adapter_folder import read_adapter
    from posttrain_dist.tuning.adapters.adapter_tuning import tuning_from_adapter

    if config.objective.own_rows:
        raise ConfigError(
            f"{config.objective.name} has a head of its own, which the base has not",
            where="objective",
            fix="merge each adapter (`posttrain export RUN OUT --merge`), and evaluate the folders",
        )
    folders = find_named(adapters)
    tunings = {
        name: {one: tuning_from_adapter(folder) for one, folder in found.items()}
        for name, found in folders.items()
    }
    every = {one: folder for found in folders.values() for one, folder in found.items()}
    for folder in every.values():
        _check(folder, config, notice)
    heldout = HeldOut(config, prepared)
    nf4 = heldout.quantized or all(map(stood_on_nf4, every.values()))
    if said := nf4_notice(every, resolve(config.model.path), nf4):
        notice(said)
    model = heldout.load_model(nf4=nf4)
    results = {}
    with restored(model):
        results[BASE] = heldout.measure(heldout.policy(model, None))
    for name, members in tunings.items():
        place, first = next(iter(folders[name].values())), next(iter(members.values()))
        with restored(model, written=first.kept):  # what was trained in full is written there
            if not read_adapter(place).config.get("trainable_token_indices"):
                forget_added(model)  # it has no rows for them
            with _of_folder(place):
                first.attach(model)
            policy = heldout.policy(model, first)
            if len(members) == 1:
                results[name] = heldout.measure(policy)
            else:
                results |= evaluate_ensemble(name, members, policy, heldout)
    return results


def _check(folder: Path, config: RunConfig, notice: Callable[[str], None]) -> None:
    """Refuse an adapter of another base, or with tokens that the rows would not have."""
    from posttrain_dist.models.folder import resolve
    from posttrain_dist.tuning.adapters.adapter_folder import read_adapter
    from posttrain_dist.tuning.adapters.base_check import check_base, check_tokens

    if said := check_base(folder, resolve(config.model.path)):
        notice(said)
    check_tokens(folder, resolve(config.model.path), config.model.add_tokens)
    if read_adapter(folder).config.get("trainable_token_indices") and not config.model.add_tokens:
        raise ConfigError(
            f"is not set, and {folder} was trained with new tokens",
            where="model.add_tokens",
            fix="list the tokens as in its training; they stand in config.yaml of its run",
        )


@contextlib.contextmanager
def _of_folder(folder: Path) -> Iterator[None]:
    """Errors of a training that goes on with an adapter, as those of its folder."""
    try:
        yield
    except PosttrainError as error:
        if not error.where.startswith(("tuning.", str(folder))):
            raise
        raise ModelError(
            f"cannot be evaluated: {error.what}",
            where=str(folder),
            fix="copy the folder again if it was damaged; `posttrain chat BASE --adapter "
            "NAME=FOLDER` takes what peft takes",
        ) from error


class HeldOut:
    """The held-out rows of a config, and what runs a model over them in one process."""

    def __init__(self, config: RunConfig, prepared: Path) -> None:
        from posttrain_dist import dist
        from posttrain_dist.build import make_source, pick_dtype
        from posttrain_dist.data.prepared.arrays import Examples
        from posttrain_dist.dist import Process

        # What is put into layers that are compiled would be compiled again each time.
        self.config = replace(config, model=replace(config.model, compile=False))
        self.device = dist.device(Process())
        self.dtype = pick_dtype(config.train.dtype)
        examples = Examples.open(prepared, "eval")
        self.channels = list(examples.channels)
        self._source = make_source(self.config, examples, Process(), mixed=False)

    @property
    def quantized(self) -> bool:
        """Whether the tuning asks for a base in NF4."""
        from posttrain_dist.tuning.base import Quantize

        return getattr(self.config.tuning, "quantize", Quantize.none) is Quantize.nf4

    def on(self, device: torch.device) -> HeldOut:
        """The same rows, on another device."""
        other = copy(self)
        other.device = device
        return other

    def load_model(self, *, nf4: bool | None = None, dtype: torch.dtype | None = None) -> Any:
        """The base model, with nothing inserted.

        Args:
            nf4: whether its weights are quantised; None: as the tuning says.
            dtype: of its weights, or what it computes in; None: that of the config.
        """
        from transformers.utils.logging import disable_progress_bar

        from posttrain_dist.models.finite import refuse_nonfinite
        from posttrain_dist.models.folder import resolve
        from posttrain_dist.models.load import load_model

        disable_progress_bar()  # what is read of an export is what it says
        folder = resolve(self.config.model.path)
        model: Any = load_model(
            self.config.model,
            folder,
            dtype=dtype or self.dtype,
            seed=self.config.seed,
            materialise=nullcontext(),
            nf4=self.quantized if nf4 is None else nf4,
            device=self.device,
        )
        model.requires_grad_(False).to(self.device)
        refuse_nonfinite(model, folder)
        return model

    def policy(self, model: nn.Module, tuning: Any) -> Policy:
        """A loaded model, with what `tuning` attached, as what an evaluation calls."""
        from posttrain_dist.build import make_policy

        return make_policy(model, len(self.channels), tuning).to(self.device).eval()

    def batches(self) -> Any:
        """All held-out rows, packed."""
        return self._source.eval_batches()

    def measure(self, policy: Policy) -> dict[str, Any]:
        """Loss and top-1 accuracy, and the loss of each channel."""
        from posttrain_dist.loop import evaluate
        from posttrain_dist.metrics.channels import ChannelMeter

        objective = self.config.objective
        meter = ChannelMeter(self.channels, objective, self.device)
        table = evaluate(_Forward(policy, self.device), self.batches(), objective, meter)
        return result_of(meter.eval_metrics(table), objective)


def result_of(metrics: Mapping[str, float], objective: Objective) -> dict[str, Any]:
    """Metrics of an evaluation, as `heldout.evaluate` returns them."""
    prefix = "eval_channel_loss/"
    of_tokens = any(column.name == "correct" for column in objective.columns)
    accuracy = "eval/accuracy" if of_tokens else f"eval_{objective.name}/accuracy"
    return {
        "loss": metrics["eval/loss"],
        "accuracy": metrics[accuracy],
        "channels": {k.removeprefix(prefix): v for k, v in metrics.items() if k.startswith(prefix)},
        "metrics": dict(metrics),
    }


class _Forward:
    """What the loop's evaluation asks of an engine."""

    def __init__(self, policy: Policy, device: torch.device) -> None:
        self._policy, self.device = policy, device

    def train(self, mode: bool) -> None:
        self._policy.train(mode)

    def forward(self, batch: Batch, objective: Any, denominators: Any) -> Loss:
        loss: Loss = self._policy(batch, objective, denominators)
        return loss
