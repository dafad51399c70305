"""The output head, chunk by chunk over rows; what both of its gradients are made with.

    for each chunk of rows:
        logits_BV  = hidden_BD @ weight.T + bias        in the dtype of the input
        statistics and d loss / d logits of each row    in float32, written over logits_BV
        grad_hidden_BD  = dlogits_BV @ weight
        grad_weight_VD += dlogits_BV.T @ hidden_BD      in float32 where there are many chunks

At no time are more than B x V logits alive.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from posttrain_kernels.passes.matmuls import make_matmuls
from posttrain_kernels.passes.targets import RowPass, Statistics, Targets

# Bytes of the logits of a chunk. A trainable head reads and writes its V x D sum of gradients once
# a chunk, which costs little only where a chunk has thousands of rows (on a GPU) or hundreds (on a
# CPU). A frozen one reads its weight alone, so that a GPU is as fast with fewer rows; a CPU is not:
# half of these bytes are 12 % slower there, a quarter 28 %.
CHUNK_BYTES_GPU_TRAINED, CHUNK_BYTES_GPU_FROZEN, CHUNK_BYTES_CPU = 1 << 30, 1 << 28, 1 << 26


@dataclass(frozen=True, slots=True)
class ChunkPlan:
    """How rows are cut into chunks, which gradients are made, and by which row pass."""

    row_pass: RowPass
    chunk_rows: int | None  # None: by `default_chunk_rows`
    hidden: bool
    weight: bool
    bias: bool
    entropy: bool = False  # among the statistics

    @classmethod
    def for_inputs(
        cls,
        hidden_ND: torch.Tensor,
        weight_VD: torch.Tensor,
        bias_V: torch.Tensor | None,
        row_pass: RowPass,
        chunk_rows: int | None,
        *,
        entropy: bool,
    ) -> ChunkPlan:
        """The gradients that the inputs require; call it outside of an autograd Function.

        Inside a Function's forward grad mode is always off.
        """
        hidden, weight, bias = (
            torch.is_grad_enabled() and x is not None and x.requires_grad
            for x in (hidden_ND, weight_VD, bias_V)
        )
        return cls(row_pass, chunk_rows, hidden, weight, bias, entropy)

    @property
    def any_gradient(self) -> bool:
        """Whether any gradient is made."""
        return self.hidden or self.weight or self.bias

    def without_gradients(self) -> ChunkPlan:
        """The same, but statistics only."""
        return replace(self, hidden=False, weight=False, bias=False)


class Gradients(NamedTuple):
    """Of the sum that `Targets` describes; None for those that the plan leaves out."""

    hidden_ND: torch.Tensor | None
    weight_VD: torch.Tensor | None  # in float32 for float16 input, whose range it may leave
    bias_V: torch.Tensor | None


def default_chunk_rows(weight_VD: torch.Tensor, vocabulary: int, *, trained: bool) -> int:
    """Rows of a chunk, a multiple of 128, so that its logits take the bytes given above."""
    if weight_VD.is_cuda:
        budget = CHUNK_BYTES_GPU_TRAINED if trained else CHUNK_BYTES_GPU_FROZEN
        row_bytes = vocabulary * weight_VD.element_size()
    else:
        budget, row_bytes = CHUNK_BYTES_CPU, vocabulary * 4
    return max(128, budget // max(row_bytes, 1) // 128 * 128)


def chunked_forward(
    hidden_ND: torch.Tensor,
    weight_VD: torch.Tensor,
    bias_V: torch.Tensor | None,
    targets: Targets,
    plan: ChunkPlan,
) -> tuple[Statistics, Gradients]:
    """Statistics and gradients of N rows; see the head of this file."""
    num_rows = len(hidden_ND)
    # Chunks of a shared vocabulary meet in a collective: cut by numbers that all ranks share.
    shard = targets.shard
    vocabulary, trained = (len(weight_VD), plan.weight) if shard is None else (shard.size, True)
    max_rows = plan.chunk_rows or default_chunk_rows(weight_VD, vocabulary, trained=trained)
    num_chunks = -(-num_rows // max_rows)
    # Chunks of equal size: a small last one would cost a whole pass over grad_weight.
    chunk_rows = -(-num_rows // max(num_chunks, 1))
    matmuls = make_matmuls(hidden_ND, weight_VD, bias_V)
    stats = Statistics.empty(num_rows, hidden_ND, entropy=plan.entropy)
    buffer_BV = matmuls.buffer(chunk_rows)
    grad_ND = torch.empty_like(hidden_ND) if plan.hidden else None
    # One chunk's product is final as it is; a sum of many is kept in float32.
    accumulate = num_chunks > 1 or hidden_ND.dtype == torch.float16
    sum_dtype = matmuls.acc_dtype if accumulate else hidden_ND.dtype
    grad_VD = weight_VD.new_empty(weight_VD.shape, dtype=sum_dtype) if plan.weight else None
    grad_V = weight_VD.new_zeros(len(weight_VD), dtype=matmuls.acc_dtype) if plan.bias else None

    for start in range(0, num_rows, max(chunk_rows, 1)):
        rows = slice(start, start + chunk_rows)
        hidden_BD = hidden_ND[rows]
        logits_BV = buffer_BV[: len(hidden_BD)]
        matmuls.logits(hidden_BD, logits_BV)
        plan.row_pass(logits_BV, targets.rows(rows), stats.rows(rows), plan.any_gradient)
        if grad_ND is not None:
            matmuls.grad_hidden(logits_BV, grad_ND[rows])
        if grad_VD is not None:
            matmuls.add_grad_weight(grad_VD, logits_BV, hidden_BD, start == 0)
        if grad_V is not None:
            grad_V += logits_BV.sum(dim=0, dtype=matmuls.acc_dtype)

    if grad_VD is not None:
        if num_rows == 0:
            grad_VD.zero_()
        if hidden_ND.dtype != torch.float16:
            grad_VD = grad_VD.to(weight_VD.dtype)
    if grad_V is not None and hidden_ND.dtype != torch.float16:
        grad_V = grad_V.to(weight_VD.dtype)
    if grad_ND is not None and targets.shard is not None:
        grad_ND = targets.shard.all_reduce(grad_ND)
    return stats, Gradients(grad_ND, grad_VD, grad_V)
