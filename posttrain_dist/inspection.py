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
from posttrain_dist.data.chat.pieces import pieces
from posttrain_dist.data.prepared.arrays import Examples
from posttrain_dist.data.read.tables import HF
from posttrain_dist.data.sources import file_sets
from posttrain_dist.dist import Process
from posttrain_dist.errors import DataError, PosttrainError
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
    _rename(report, config)
    report["name"] = config.name
    report["settings"]["tokenizer"] = config.model.path  # that it was made with may have moved
    report["sources"] = _sources(config, examples)
    report["batch"] = _batch(config, examples)
    return report


def _rename(report: dict[str, Any], config: RunConfig) -> None:
    """The files as this run names them: the cache may have met the same content elsewhere."""
    try:
        now = [
            (each.name, name)
            for each in file_sets(config.data, config.objective.rows)
            for name in ([each.path] if each.path.startswith(HF) else map(str, each.files))
        ]
    except PosttrainError:
        return  # the files are gone
    then = [(file["source"], file["path"]) for file in report["files"]]
    if [source for source, _ in now] != [source for source, _ in then]:
        return  # it is of a part of them
    names = {old: new for (_, old), (_, new) in zip(then, now, strict=True)}

    def place(where: str) -> str:
        file, _, line = where.rpartition(":")
        return f"{names.get(file, file)}:{line}"

    for file in report["files"]:
        file["path"] = names[file["path"]]
    for rejected in report["rejected"]:
        rejected["file"] = names.get(rejected["file"], rejected["file"])
    for check in report["checks"]:
        check["rows"] = list(map(place, check["rows"]))
    for example in (each for some in report["examples"].values() for each in some):
        example["where"] = place(example["where"])


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
        share.name: {
            "asked": share.target,
            "rows_share": float(rows[i] / rows.sum()),
            "token_share": float(tokens[i] / tokens.sum()),
            "passes": share.passes,
        }
        for i, share in enumerate(mixture.phases[0])
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
