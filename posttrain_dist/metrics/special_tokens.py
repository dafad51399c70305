"""Loss and accuracy of the tokens that open and close turns, tool calls and think blocks.

A model that never stops, or never closes a tool call, has a good mean loss: these tokens are few.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from posttrain_dist import dist
from posttrain_dist.flow import Batch
from posttrain_dist.metrics.channels import ChannelMeter, Tabulated

LOSS, WEIGHT, CORRECT, COUNT = range(4)  # columns of the table of special tokens


class SpecialTokenMeter:
    """Adds up a row (loss sum, weight, correct, count) for each watched token, on the device.

    Nothing is read back before `flush`, and shapes do not depend on the data. Reduction of every
    number: sums over ranks and steps; a mean is sum / weight.
    """

    def __init__(self, tokens: dict[int, str], device: torch.device) -> None:
        ids = sorted(tokens)
        self.names = [tokens[token_id] for token_id in ids]
        self._ids_K = torch.tensor(ids, dtype=torch.int64, device=device)
        # One row more takes in all other tokens.
        self._table = torch.zeros(len(ids) + 1, 4, dtype=torch.float64, device=device)

    def add(self, loss: Any, batch: Batch) -> None:
        """Take in one micro-batch of this rank: `nll_N` and `correct_N` of a Loss.

        An objective without losses of single tokens leaves both None, and nothing is added.
        """
        if loss.nll_N is None or loss.correct_N is None or not self.names:
            return
        device = self._table.device
        labels_N = batch.labels_N.to(device, non_blocking=True)
        weight_N = batch.weight_N if loss.counted_N is None else loss.counted_N
        weight_N = weight_N.to(device, non_blocking=True).double()
        place_N = torch.searchsorted(self._ids_K, labels_N).clamp_(max=len(self.names) - 1)
        row_N = torch.where(self._ids_K[place_N] == labels_N, place_N, len(self.names))
        counted_N = weight_N > 0
        columns = (loss.nll_N * weight_N, weight_N, loss.correct_N & counted_N, counted_N)
        values_N4 = torch.stack([column.double() for column in columns], dim=1)
        self._table.index_add_(0, row_N, values_N4)

    def flush(self) -> torch.Tensor:
        """Global table [K, 4] (float64, CPU) since the last flush; collective."""
        table_K4 = dist.all_sum(self._table[:-1].clone()).cpu()
        self._table.zero_()
        return table_K4


class Tables(NamedTuple):
    """What a TokenMeter has summed: float64, on the CPU."""

    channels_CK: torch.Tensor
    special_tokens: torch.Tensor  # [watched tokens, 4]


class TokenMeter:
    """A ChannelMeter and a SpecialTokenMeter as one meter.

    Args:
        channels: names of the channels.
        tokens: what `special_tokens` gave.
        objective: whose tables are summed.
    """

    def __init__(
        self,
        channels: list[str],
        tokens: dict[int, str],
        objective: Tabulated,
        device: torch.device,
    ) -> None:
        self._channels = ChannelMeter(channels, objective, device)
        self._special = SpecialTokenMeter(tokens, device)

    def add(self, loss: Any, batch: Batch) -> None:
        """Take in one micro-batch of this rank."""
        self._channels.add(loss, batch)
        self._special.add(loss, batch)

    def flush(self) -> tuple[Tables, int]:
        """Global tables and real tokens since the last flush; collective."""
        channels_CK, tokens = self._channels.flush()
        return Tables(channels_CK, self._special.flush()), tokens

    def train_metrics(self, tables: Tables) -> dict[str, float]:
        """The metrics of a training step, from what `flush` gave."""
        special = special_token_metrics(tables.special_tokens, self._special.names)
        return {**self._channels.train_metrics(tables.channels_CK), **special}

    def eval_metrics(self, tables: Tables) -> dict[str, float]:
        """The metrics of an evaluation, from what `flush` gave."""
        special = special_token_metrics(tables.special_tokens, self._special.names, prefix="eval_")
        return {**self._channels.eval_metrics(tables.channels_CK), **special}


def special_token_metrics(
    table_K4: torch.Tensor, names: list[str], prefix: str = ""
) -> dict[str, float]:
    """`special_token_loss/<token>` and `special_token_accuracy/<token>` of those that occurred."""
    metrics = {}
    for name, row in zip(names, table_K4.tolist(), strict=True):
        if row[WEIGHT] > 0:
            metrics[f"{prefix}special_token_loss/{name}"] = row[LOSS] / row[WEIGHT]
            metrics[f"{prefix}special_token_accuracy/{name}"] = row[CORRECT] / row[COUNT]
    return metrics
