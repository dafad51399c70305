"""The output head split over the vocabulary (tensor parallelism): each rank holds some rows of it.

As in Megatron-LM (Shoeybi et al. 2019, section 3): ranks exchange four numbers a row, never
logits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist


class SoftmaxPart(NamedTuple):
    """Statistics of a softmax over a whole row or a part of the vocabulary, each [B, 1]."""

    max: torch.Tensor
    sum_exp: torch.Tensor  # of exp(z - max)
    label_logit: torch.Tensor  # z[label]; -inf where the label is not in this part
    dot: torch.Tensor  # of exp(z - max) and z - max; 0 without entropy


@dataclass(frozen=True, slots=True)
class VocabShard:
    """This rank's part of the vocabulary.

    Every rank of `group` is given the same rows of hidden and the same targets; each holds other
    rows of the weight, together all of them, in any sizes.

    Attributes:
        start: vocabulary index of this rank's first row of the weight.
        size: of the whole vocabulary.
        group: the ranks that share it; None: all.
    """

    start: int
    size: int
    group: dist.ProcessGroup | None = None

    def merge(self, part: SoftmaxPart) -> SoftmaxPart:
        """The statistics of whole rows from those of each rank's part."""
        local_4B1 = torch.stack(list(part))
        ranks = dist.get_world_size(self.group)
        parts_R4B1 = local_4B1.new_empty(ranks, *local_4B1.shape)
        dist.all_gather_into_tensor(parts_R4B1.flatten(0, 1), local_4B1, group=self.group)
        max_RB1, sum_RB1, label_RB1, dot_RB1 = parts_R4B1.unbind(dim=1)
        max_B1 = max_RB1.amax(dim=0)
        shift_RB1 = max_RB1 - max_B1
        factor_RB1 = shift_RB1.exp()
        return SoftmaxPart(
            max=max_B1,
            sum_exp=(factor_RB1 * sum_RB1).sum(dim=0),
            label_logit=label_RB1.amax(dim=0),
            dot=(factor_RB1 * (dot_RB1 + shift_RB1 * sum_RB1)).sum(dim=0),
        )

    def all_reduce(self, partial: torch.Tensor) -> torch.Tensor:
        """The sum over ranks of a tensor, such as its part of the gradient of hidden."""
        total = partial.float() if partial.dtype in (torch.float16, torch.bfloat16) else partial
        dist.all_reduce(total, group=self.group)
        return total.to(partial.dtype)
