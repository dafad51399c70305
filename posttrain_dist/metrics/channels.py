"""Sums per channel, over micro-batches, steps and ranks; means only at the very end."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Protocol

import torch

from posttrain_dist import dist
from posttrain_dist.flow import Batch, Column, Loss


class Tabulated(Protocol):
    """An objective, as far as its metrics are concerned."""

    columns: ClassVar[tuple[Column, ...]]

    @property
    def name(self) -> str:
        """What its own metrics stand below."""

    def derived(self, sums: Mapping[str, float]) -> dict[str, float]:
        """See `objectives/base.py`."""


class ChannelMeter:
    """Adds up channel tables on the device; reads them back only when asked.

    Reduction of every number: sums over ranks and steps; a mean is sum / sum.
    """

    def __init__(self, channels: list[str], objective: Tabulated, device: torch.device) -> None:
        self.channels, self._objective = channels, objective
        shape = (len(channels), len(objective.columns))
        self._table_CK = torch.zeros(shape, dtype=torch.float64, device=device)
        self._tokens = 0

    def add(self, loss: Loss, batch: Batch) -> None:
        """Take in one micro-batch of this rank."""
        self._table_CK += loss.channels_CK
        self._tokens += batch.num_tokens

    def flush(self) -> tuple[torch.Tensor, int]:
        """Global table [C, K] (float64, CPU) and real tokens since the last flush; collective."""
        tokens = self._table_CK.new_full((1,), float(self._tokens))
        flat = dist.all_sum(torch.cat([self._table_CK.flatten(), tokens])).cpu()
        self._table_CK.zero_()
        self._tokens = 0
        return flat[:-1].reshape(self._table_CK.shape), int(flat[-1])

    def train_metrics(self, table_CK: torch.Tensor) -> dict[str, float]:
        """The metrics of a training step, from what `flush` gave."""
        return train_metrics(table_CK, self.channels, self._objective)

    def eval_metrics(self, table_CK: torch.Tensor) -> dict[str, float]:
        """The metrics of an evaluation, from what `flush` gave."""
        return eval_metrics(table_CK, self.channels, self._objective)


def train_metrics(
    table_CK: torch.Tensor, channels: list[str], objective: Tabulated
) -> dict[str, float]:
    """`train/loss`, `channel_loss/<channel>`, `channel_share/<channel>` (of what the loss is a
    mean over), and the objective's own: `<objective>/<column>` and
    `<objective>_channel_<column>/<channel>`.
    """
    table = _Table(table_CK, channels, objective)
    loss, weight = table.loss, table.place(table.loss.per)
    total = table_CK.sum(dim=0)
    metrics = table.overall("train/loss", loss)
    for channel, row in zip(channels, table_CK, strict=True):
        if row[weight] > 0:
            metrics[f"channel_loss/{channel}"] = table.mean(loss, row)
            metrics[f"channel_share/{channel}"] = float(row[weight] / total[weight])
    return metrics | table.own_metrics("")


def eval_metrics(
    table_CK: torch.Tensor, channels: list[str], objective: Tabulated
) -> dict[str, float]:
    """`eval/loss`, `eval/accuracy` (top-1 of tokens, where there is a column `correct`),
    `eval_channel_loss/<channel>`, and the objective's own with `eval_` before them.
    """
    table = _Table(table_CK, channels, objective)
    metrics = table.overall("eval/loss", table.loss)
    if table.correct is not None:
        metrics |= table.overall("eval/accuracy", table.correct)
    weight = table.place(table.loss.per)
    for channel, row in zip(channels, table_CK, strict=True):
        if row[weight] > 0:
            metrics[f"eval_channel_loss/{channel}"] = table.mean(table.loss, row)
    return metrics | table.own_metrics("eval_") | table.derived_metrics("eval_")


class _Table:
    """A channel table, read by the columns of its objective."""

    def __init__(self, table_CK: torch.Tensor, channels: list[str], objective: Tabulated) -> None:
        self._table_CK, self._channels, self._name = table_CK, channels, objective.name
        self._places = {column.name: k for k, column in enumerate(objective.columns)}
        named = {column.name: column for column in objective.columns}
        self.loss, self.correct = named["loss"], named.get("correct")
        general = [column for column in (self.loss, self.correct) if column is not None]
        taken = {column.name for column in general}
        taken |= {column.per for column in objective.columns if column.per is not None}
        self._own = [c for c in objective.columns if c.name not in taken and not c.part]
        self._derived = objective.derived

    def place(self, name: str | None) -> int:
        """The index of a column."""
        assert name is not None, "a loss is a mean: its column has a `per`"
        return self._places[name]

    def mean(self, column: Column, row_K: torch.Tensor) -> float:
        """The metric of a column in one row."""
        value = row_K[self._places[column.name]]
        return float(value if column.per is None else value / row_K[self._places[column.per]])

    def overall(self, name: str, column: Column) -> dict[str, float]:
        """The metric of a column over all channels."""
        return {name: self.mean(column, self._table_CK.sum(dim=0))}

    def own_metrics(self, prefix: str) -> dict[str, float]:
        """Columns that no other objective has; without those that nothing was counted in."""
        metrics = {}
        for column in self._own:
            for key, row_K in self._rows():
                if column.per is not None and not row_K[self._places[column.per]] > 0:
                    continue
                metrics[prefix + self._key(column.name, key)] = self.mean(column, row_K)
        return metrics

    def derived_metrics(self, prefix: str) -> dict[str, float]:
        """What the objective makes of several columns."""
        metrics = {}
        for key, row_K in self._rows():
            sums = dict(zip(self._places, row_K.tolist(), strict=True))
            for name, value in self._derived(sums).items():
                metrics[prefix + self._key(name, key)] = value
        return metrics

    def _rows(self) -> list[tuple[str, torch.Tensor]]:
        """That of all channels, and of each."""
        each = zip(self._channels, self._table_CK, strict=True)
        return [("", self._table_CK.sum(dim=0)), *each]

    def _key(self, name: str, channel: str) -> str:
        place = f"_channel_{name}/{channel}" if channel else f"/{name}"
        return f"{self._name}{place}"
