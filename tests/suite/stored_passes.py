"""A pass over hand-made samples, by a reference of which every value is known."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from posttrain_dist.data.packs.loader import PackedSource
from posttrain_dist.data.prepared.arrays import Examples, SplitWriter, flatten
from posttrain_dist.flow import Batch, By, Example, Extra
from posttrain_dist.objectives.base import TokenLoss
from posttrain_dist.objectives.reference_choice import REF_LOGPROB
from posttrain_dist.reference.kept_log_probs import StoredLogProbs
from posttrain_dist.reference.precomputed import complete


class Compared(TokenLoss):
    extra = (Extra("role_S", index=True, by=By.data), REF_LOGPROB)


def write_units(folder: Path, units: int = 12) -> None:
    """Each unit: a prompt of 3 tokens, and answers of 2 and of 1; ids are all different."""
    with SplitWriter(folder / "samples") as writer:
        examples: list[Example] = []
        for unit in range(units):
            first, token = len(examples), 10 * unit
            for ids, parent in ([0, 1, 2], None), ([3, 4], first), ([5], first):
                ids_L = np.array(ids, np.int32) + token
                weight_L = np.full(len(ids), float(parent is not None), np.float32)
                role = {"role_S": -1 if parent is None else 0}
                sample_id = 1000 - len(examples)  # no place in the arrays
                example = Example(
                    ids_L, weight_L, 0, sample_id, extra=role, parent=parent, unit=first
                )
                examples.append(example)
        writer.append(flatten(examples))


def opened(folder: Path, key: str = "a") -> tuple[StoredLogProbs, Examples]:
    """The folder of the values, and all samples."""
    examples = Examples.open(folder, "all", ["a"])
    stored = StoredLogProbs(folder / "reference", key, examples.num_stored_tokens, len(examples))
    stored.restore(folder / "cached")
    return stored, examples


def negative_ids(batch: Batch) -> torch.Tensor:
    """The log-probability of a token is minus its id."""
    return -batch.labels_N.float()


def source_of(examples: Examples, rank: int = 0, world: int = 1) -> PackedSource:
    return PackedSource(
        examples,
        Compared(),
        max_length=13,
        window=64,
        seed=0,
        batch_size=2,
        micro_batch_size=1,
        rank=rank,
        world=world,
    )


def fill(stored: StoredLogProbs, examples: Examples, score, part_tokens: int) -> list[str]:
    """Run the pass; its lines of progress."""
    lines: list[str] = []
    complete(
        stored,
        examples,
        lambda: score,
        source_of,
        torch.device("cpu"),
        part_tokens=part_tokens,
        say=lines.append,
    )
    return lines


def expected(examples: Examples) -> np.ndarray:
    """Minus the id of every token of an answer; NaN for those of prompts."""
    values = []
    for i in range(len(examples)):
        example = examples[i]
        values.append(np.where(example.weight_L > 0, -example.input_ids_L.astype(float), np.nan))
    return np.concatenate(values)
