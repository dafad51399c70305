"""What is in the prepared data, and how this run takes it: the dict of the data report, whole."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from posttrain_dist.build import make_mixture, make_source
from posttrain_dist.config import RunConfig
from posttrain_dist.data.arrays import Examples
from posttrain_dist.data.pieces import pieces
from posttrain_dist.dist import Process
from posttrain_dist.errors import DataError
from posttrain_dist.models.folder import load_tokenizer, resolve


def inspect(config: RunConfig, folder: Path) -> dict[str, Any]:
    """data_report.json, with the mix of sources and the first packed batch of this run.

    Args:
        folder: that `posttrain_dist.prepare.prepare` wrote for this config.

    Raises:
        DataError: `folder` is not a prepared one.
    """
    try:
        report: dict[str, Any] = json.loads((folder / "data_report.json").read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(
            f"is no prepared data folder: {error}", where=str(folder), fix="prepare the data again"
        ) from error
    examples = Examples.open(folder, "train")
    report["name"] = config.name
    report["settings"]["tokenizer"] = config.model.path  # that it was made with may have moved
    report["sources"] = _sources(config, examples)
    report["batch"] = _batch(config, examples)
    return report


def _sources(config: RunConfig, examples: Examples) -> dict[str, dict[str, float]]:
    """How much of an epoch, as it is drawn at the beginning, comes from each source."""
    mixture = make_mixture(config, examples)
    if mixture is None:
        return {}
    drawn = mixture.draw(0, 0)
    sources, size = examples.sources[drawn], len(config.data.sources)
    rows = np.bincount(sources, minlength=size)
    tokens = np.bincount(sources, examples.supervised[drawn], size)
    return {
        portion.name: {
            "asked": portion.asked,
            "rows_share": float(rows[i] / rows.sum()),
            "token_share": float(tokens[i] / tokens.sum()),
            "passes": portion.passes,
        }
        for i, portion in enumerate(mixture.phases[0])
    }


def _batch(config: RunConfig, examples: Examples) -> dict[str, Any]:
    """The first pack of a run, as a batch of its own, token by token."""
    if not len(examples):
        return {}
    config = replace(config, train=replace(config.train, micro_batch_size=1))
    batch = make_source(config, examples, Process()).step(1)[0]
    weight_T = np.zeros(len(batch.input_ids_T), np.float32)
    # What is predicted at a position is the token behind it.
    is_target_N = batch.weight_N.numpy() > 0
    weight_T[batch.supervised_N.numpy()[is_target_N] + 1] = batch.weight_N.numpy()[is_target_N]
    tokenizer = load_tokenizer(resolve(config.model.path))
    ids_T, cu_S = batch.input_ids_T.numpy(), batch.cu_seqlens_S
    return {
        "tokens": len(ids_T),
        "samples": len(cu_S) - 1,
        "pieces": [
            [*piece, sample]
            for sample, (start, end) in enumerate(pairwise(cu_S))
            for piece in pieces(ids_T[start:end], weight_T[start:end], tokenizer)
        ],
    }
