"""Sums per channel, over micro-batches, steps and ranks; means only at the very end."""

from __future__ import annotations

import torch

from posttrain_dist import dist
from posttrain_dist.flow import Batch, Loss

# Columns of the channel table, and one more of our own.
LOSS, WEIGHT, CORRECT, COUNT = range(4)


class ChannelMeter:
    """Adds up channel tables on the device; reads them back only when asked.

    Reduction of every number: sums over ranks and steps; a mean is sum / weight.
    """

    def __init__(self, channels: list[str], device: torch.device) -> None:
        self.channels = channels
        self._table_C4 = torch.zeros(len(channels), 4, dtype=torch.float64, device=device)
        self._tokens = 0

    def add(self, loss: Loss, batch: Batch) -> None:
        """Take in one micro-batch of this rank."""
        self._table_C4 += loss.channels_C4
        self._tokens += batch.num_tokens

    def flush(self) -> tuple[torch.Tensor, int]:
        """Global table [C, 4] (float64, CPU) and real tokens since the last flush; collective."""
        tokens = self._table_C4.new_full((1,), float(self._tokens))
        flat = dist.all_sum(torch.cat([self._table_C4.flatten(), tokens])).cpu()
        self._table_C4.zero_()
        self._tokens = 0
        return flat[:-1].reshape(-1, 4), int(flat[-1])


def train_metrics(table_C4: torch.Tensor, channels: list[str]) -> dict[str, float]:
    """`train/loss`, `channel_loss/<channel>` and `channel_share/<channel>` (of the weight)."""
    total = table_C4.sum(dim=0)
    metrics = {"train/loss": float(total[LOSS] / total[WEIGHT])}
    for channel, row in zip(channels, table_C4, strict=True):
        if row[WEIGHT] > 0:
            metrics[f"channel_loss/{channel}"] = float(row[LOSS] / row[WEIGHT])
            metrics[f"channel_share/{channel}"] = float(row[WEIGHT] / total[WEIGHT])
    return metrics


def eval_metrics(table_C4: torch.Tensor, channels: list[str]) -> dict[str, float]:
    """`eval/loss`, `eval/accuracy` (top-1 of tokens) and `eval_channel_loss/<channel>`."""
    total = table_C4.sum(dim=0)
    metrics = {
        "eval/loss": float(total[LOSS] / total[WEIGHT]),
        "eval/accuracy": float(total[CORRECT] / total[COUNT]),
    }
    for channel, row in zip(channels, table_C4, strict=True):
        if row[WEIGHT] > 0:
            metrics[f"eval_channel_loss/{channel}"] = float(row[LOSS] / row[WEIGHT])
    return metrics
