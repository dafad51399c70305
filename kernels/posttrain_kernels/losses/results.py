"""Results of the losses: the normalised sum, the columns of all rows, sums per channel."""

from __future__ import annotations

from typing import NamedTuple

import torch

from posttrain_kernels.losses.arguments import LossInputs
from posttrain_kernels.passes.targets import Statistics, Targets


class HeadLoss(NamedTuple):
    """Result of a cross-entropy; a tuple, so that the hooks of ZeRO-3 see its tensors."""

    loss: torch.Tensor  # float32 scalar, carries the gradient
    nll_N: torch.Tensor  # detached float32, unweighted; 0 where the label is -100
    channels_C4: torch.Tensor  # detached float32: loss sum, weight, correct, count
    correct_N: torch.Tensor  # bool: no other token exceeds the label
    entropy_N: torch.Tensor | None = None  # detached float32, nats; with entropy=True


def make_head_loss(
    loss: torch.Tensor,
    stats: Statistics,
    inputs: LossInputs,
    channel: torch.Tensor | None,
    num_channels: int,
) -> HeadLoss:
    """The result for all N rows."""
    num_rows = len(inputs.weight_N)
    columns = (scatter_to_rows(column, inputs.label_rows, num_rows) for column in stats)
    stats = Statistics(*columns)  # type: ignore[arg-type]
    table_C4 = channel_table(stats, inputs.weight_N, channel, num_channels)
    return HeadLoss(loss, stats.nll, table_C4, stats.correct, stats.entropy)


def channel_table(
    stats: Statistics, weight_N: torch.Tensor, channel: torch.Tensor | None, num_channels: int
) -> torch.Tensor:
    """[C, 4] float32: weighted loss sum, weight, correct, count; added up in float64.

    A product with one-hot rows, not a scatter: no atomics, so the same bits every time. A channel
    out of range on a GPU, where none is checked, makes the table NaN instead of falling away.
    """
    if channel is None:
        return weight_N.new_zeros(num_channels, 4, dtype=torch.float32)
    counted_N = weight_N > 0
    columns = (stats.nll * weight_N, weight_N, stats.correct & counted_N, counted_N)
    rows_N4 = torch.stack([column.double() for column in columns], dim=1)
    channel_ids_C1 = torch.arange(num_channels, device=channel.device)[:, None]
    table_C4 = (channel_ids_C1 == channel).double() @ rows_N4
    if channel.device.type != "cpu":
        inside = ((channel >= 0) & (channel < num_channels)).all()
        table_C4 = torch.where(inside, table_C4, torch.nan)
    return table_C4.float()


def scatter_to_rows(
    column: torch.Tensor | None, label_rows: torch.Tensor | None, num_rows: int
) -> torch.Tensor | None:
    """A value of each of K rows -> of all N rows, 0 elsewhere; gradients pass."""
    if label_rows is None or column is None:
        return column
    return column.new_zeros(num_rows).index_copy(0, label_rows, column)


def total_loss(stats: Statistics, targets: Targets, scale: torch.Tensor) -> torch.Tensor:
    """The normalised loss, a scalar in the dtype of the statistics, summed in float64."""
    loss_N = stats.nll
    if targets.transform.z_loss:
        loss_N = loss_N + targets.transform.z_loss * stats.logsumexp.square()
    return ((loss_N * targets.weight_N).sum(dtype=torch.float64) * scale).to(loss_N.dtype)
