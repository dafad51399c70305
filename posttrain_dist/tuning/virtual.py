"""Virtual tokens in a packed row: trained vectors that stand before every sample."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from posttrain_dist.flow import Batch


def insert_virtual_tokens(batch: Batch, num: int) -> Batch:
    """`num` virtual tokens before each root of the row; samples with a parent follow its own.

    Virtual token k has the id -1 - k, from 0, which no embedding has. Positions count it.
    """
    import torch

    cu_seqlens_S = [0]
    shifts: list[int] = []  # of each real token
    places: list[int] = []  # of the virtual ones
    for (start, end), parent in zip(pairwise(batch.cu_seqlens_S), batch.parent_S, strict=True):
        if parent < 0:
            places += range(cu_seqlens_S[-1], cu_seqlens_S[-1] + num)
        shifts += [len(places)] * (end - start)
        cu_seqlens_S.append(end + len(places))
    device = batch.input_ids_T.device
    shift_T = torch.tensor(shifts).to(device, non_blocking=True)
    place_T = torch.arange(len(shifts), device=device) + shift_T
    place_V = torch.tensor(places, dtype=torch.int64).to(device, non_blocking=True)
    virtual_V = torch.arange(num, device=device).repeat(len(places) // num if num else 0)

    def merged(real_T: torch.Tensor, virtual_V: torch.Tensor) -> torch.Tensor:
        row = real_T.new_empty(cu_seqlens_S[-1])
        return row.index_copy_(0, place_T, real_T).index_copy_(0, place_V, virtual_V)

    return replace(
        batch,
        input_ids_T=merged(batch.input_ids_T, -1 - virtual_V),
        position_ids_T=merged(batch.position_ids_T + num, virtual_V),
        cu_seqlens_S=cu_seqlens_S,
        bounds_S=torch.tensor(cu_seqlens_S, dtype=torch.int32).to(device, non_blocking=True),
        max_seqlen=max(end - start for start, end in pairwise(cu_seqlens_S)),
        supervised_N=batch.supervised_N + shift_T[batch.supervised_N],
    )
