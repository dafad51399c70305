"""Held-out loss per channel of any model folder, in one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from posttrain_dist.config import RunConfig


def evaluate(config: RunConfig, folder: Path) -> dict[str, Any]:
    """Loss of `config.model` on the held-out rows of `config.data`.

    Args:
        folder: where the tokenised rows go (`folder/prepared`).

    Returns:
        {"loss": mean over supervised tokens, "accuracy": their top-1 share,
        "channels": {name: loss}}.
    """
    from dataclasses import replace

    from posttrain_dist.data.loader import Examples
    from posttrain_dist.dist import Process
    from posttrain_dist.engine import Single
    from posttrain_dist.loop import evaluate as evaluate_batches
    from posttrain_dist.metrics.channels import ChannelMeter, eval_metrics
    from posttrain_dist.prepare import prepare
    from posttrain_dist.train import build_policy, make_engine, pick_dtype, source_of

    config = replace(config, engine=Single())
    prepare(config, folder / "prepared")
    examples = Examples.open(folder / "prepared", "eval")
    channels = list(examples.channels)
    dtype = pick_dtype(config.train.dtype)
    engine = make_engine(config, Process(), dtype)
    build_policy(config, engine, dtype, channels)
    batches = source_of(config, examples, Process()).eval_batches()
    meter = ChannelMeter(channels, engine.device)
    metrics = eval_metrics(evaluate_batches(engine, batches, config.objective, meter), channels)
    prefix = "eval_channel_loss/"
    return {
        "loss": metrics["eval/loss"],
        "accuracy": metrics["eval/accuracy"],
        "channels": {k.removeprefix(prefix): v for k, v in metrics.items() if k.startswith(prefix)},
    }
