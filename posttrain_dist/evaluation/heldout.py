"""Held-out loss per channel of any model folder, in one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from posttrain_dist.config import RunConfig
from posttrain_dist.models import Weights


def evaluate(config: RunConfig, prepared: Path) -> dict[str, Any]:
    """Loss of `config.model` on the held-out rows of `config.data`.

    Args:
        prepared: the folder that `posttrain_dist.prepare.prepare` wrote.

    Returns:
        {"loss": mean over supervised tokens, "accuracy": their top-1 share, "channels": {name:
        loss}, "metrics": all of them by their names}; of an objective that compares answers, mean
        and share over comparisons.

    Raises:
        ModelError: a reward model is asked for, and the folder has no head that scores.
    """
    from dataclasses import replace

    from posttrain_dist.build import build_policy, make_engine, make_source, pick_dtype
    from posttrain_dist.config.reference_rules import reference_alone_problems
    from posttrain_dist.data.prepared.arrays import Examples
    from posttrain_dist.dist import Process
    from posttrain_dist.engine import Single
    from posttrain_dist.errors import ModelError, raise_all
    from posttrain_dist.evaluation.adapter_losses import HeldOut, result_of
    from posttrain_dist.loop import evaluate as evaluate_batches
    from posttrain_dist.metrics.channels import ChannelMeter
    from posttrain_dist.models.classifier import is_classifier
    from posttrain_dist.models.folder import check_folder, resolve
    from posttrain_dist.models.quantized import holds_nf4

    raise_all(reference_alone_problems(config))
    fresh = config.model.weights is Weights.random
    network = check_folder(resolve(config.model.path), need_weights=not fresh)
    if config.objective.own_rows and not is_classifier(network):
        raise ModelError(
            "is a language model: it has no head that scores answers, and a new one knows nothing",
            where=f"model.path={config.model.path}",
            fix="name the export of a run with objective=reward",
        )
    if config.tuning.whole_model and holds_nf4(network):  # an engine is for what can be trained
        heldout = HeldOut(config, prepared)
        return heldout.measure(heldout.policy(heldout.load_model(), None))
    config = replace(config, engine=Single())
    examples = Examples.open(prepared, "eval")
    channels = list(examples.channels)
    dtype = pick_dtype(config.train.dtype)
    engine = make_engine(config, Process(), dtype)
    build_policy(config, engine, dtype, channels)
    batches = make_source(config, examples, Process(), mixed=False).eval_batches()
    meter = ChannelMeter(channels, config.objective, engine.device)
    metrics = meter.eval_metrics(evaluate_batches(engine, batches, config.objective, meter))
    return result_of(metrics, config.objective)
