"""An objective of two components with a column and extra fields of its own, and data for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch

from posttrain_dist.data.packs.collate import collate, filler
from posttrain_dist.flow import Batch, Column, Example, Extra, Loss
from posttrain_dist.objectives.base import Objective


class RatioCount(NamedTuple):
    tokens: float
    samples: float


@dataclass(kw_only=True, slots=True)
class Ratio(Objective):
    """Mean cross-entropy, plus the sum of logprob / old_logprob divided by the number of pairs."""

    extra: ClassVar[tuple[Extra, ...]] = (Extra("old_logprob_N"), Extra("pair_S", index=True))
    columns: ClassVar[tuple[Column, ...]] = (
        Column("loss", per="weight"),
        Column("weight"),
        Column("ratio", per="weight"),
        Column("paired"),
    )

    def count(self, batch: Batch) -> RatioCount:
        return RatioCount(batch.weight_sum, float((batch.extra["pair_S"] >= 0).sum()))

    def loss(self, hidden_ND: torch.Tensor, head: Any, batch: Batch, denominators: Any) -> Loss:
        real_N = batch.weight_N > 0
        logprob_N = head.logprob(hidden_ND, batch.labels_N).logprob_N
        old_N = torch.where(real_N, batch.extra["old_logprob_N"], 1.0)  # padding is 0
        nll_N = torch.where(real_N, -logprob_N * batch.weight_N, 0.0)
        ratio_N = torch.where(real_N, logprob_N / old_N, 0.0)
        total = nll_N.sum() / denominators.tokens + ratio_N.sum() / denominators.samples
        table_CK = torch.zeros(head.num_channels, len(self.columns))
        columns = (nll_N, batch.weight_N, ratio_N * batch.weight_N)
        table_CK[:, :3].index_add_(0, batch.channel_N, torch.stack(columns, 1).detach().float())
        table_CK[0, 3] = (batch.extra["pair_S"] >= 0).sum()
        return Loss(total, table_CK)


def unit(draw: np.random.Generator, first_id: int, answers: int) -> list[Example]:
    """A prompt and some answers that follow it."""

    def example(i: int, length: int, parent: int | None) -> Example:
        weight_L = (draw.random(length) < 0.7).astype(np.float32) * 0.5
        return Example(
            input_ids_L=draw.integers(5, 200, length).astype(np.int32),
            weight_L=weight_L * (parent is not None),
            channel=i % 2,
            sample_id=first_id + i,
            extra={
                "old_logprob_L": -draw.uniform(0.5, 3.0, length).astype(np.float32),
                "pair_S": -1 if parent is None else first_id,
            },
            parent=parent,
        )

    prompt = example(0, 9, None)
    return [prompt, *(example(i, 3 + 4 * i, first_id) for i in range(1, answers + 1))]


class Units:
    """Each step is three units; rank r of w runs those with number r, r + w, ..., then fillers."""

    prefetchable = True

    def __init__(self, rank: int = 0, world: int = 1) -> None:
        self._rank, self._world = rank, world

    def units(self, k: int) -> list[list[Example]]:
        draw = np.random.default_rng(k)
        return [unit(draw, 10 * i, answers=i + 1) for i in range(3)]

    def step(self, k: int) -> list[Batch]:
        units = self.units(k)
        mine = [collate(u) for u in units[self._rank :: self._world]]
        most = -(-len(units) // self._world)
        return mine + [filler(Ratio()) for _ in range(most - len(mine))]

    def sample_ids(self, k: int) -> list[int]:
        return [e.sample_id for u in self.units(k) for e in u]
