"""Sums per channel from what the row pass found out."""

from __future__ import annotations

import torch

from posttrain_kernels.passes.targets import Statistics


def channel_table(
    found: Statistics, weight_N: torch.Tensor, channel: torch.Tensor | None, num_channels: int
) -> torch.Tensor:
    """[C, 4] float32: weighted loss sum, weight, correct, count; added up in float64.

    A product with one-hot rows, not a scatter: no atomics, so the same bits every time. A channel
    out of range on a GPU, where nobody looked, makes the table NaN instead of falling away.
    """
    if channel is None:
        return weight_N.new_zeros(num_channels, 4, dtype=torch.float32)
    counted_N = weight_N > 0
    columns = (found.nll * weight_N, weight_N, found.correct & counted_N, counted_N)
    rows_N4 = torch.stack([column.double() for column in columns], dim=1)
    names_C1 = torch.arange(num_channels, device=channel.device)[:, None]
    table_C4 = (names_C1 == channel).double() @ rows_N4
    if channel.device.type != "cpu":
        inside = ((channel >= 0) & (channel < num_channels)).all()
        table_C4 = torch.where(inside, table_C4, torch.nan)
    return table_C4.float()
