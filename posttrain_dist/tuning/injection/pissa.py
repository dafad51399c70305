"""PiSSA (Meng et al., arXiv:2404.02948): A and B begin as the largest singular vectors.

    W = U S V,  B0 = U_r sqrt(S_r / scale),  A0 = sqrt(S_r / scale) V_r,  W_frozen = W - scale B0 A0

A0 and B0 stay beside A and B as buffers: W + scale (B A - B0 A0) is then known without W_frozen,
which no file holds.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from posttrain_dist.tuning.base import gathered
from posttrain_dist.tuning.injection.inject import ADAPTER, layers_with

INITIAL_A, INITIAL_B = "pissa_initial_A", "pissa_initial_B"
# Above this smaller dimension the vectors are found by iteration (Halko et al., arXiv:0909.4061):
# of 4096 x 4096 the whole decomposition takes half a minute, and a model has hundreds. What is
# found need not be exact, for what the frozen weight keeps is the rest of it.
_EXACT_UP_TO = 1024
_ITERATIONS = 16


@torch.no_grad()
def begin_with_singular_vectors(model: nn.Module, scale: float) -> None:
    """Set A and B, and their copies A0 and B0; the base weight is left as it is."""
    for module in layers_with(model, "lora_A").values():
        weight = module.get_base_layer().weight
        a, b = module.lora_A[ADAPTER].weight, module.lora_B[ADAPTER].weight
        with gathered(weight):
            # On a GPU where there is one: a model of 70B is a quarter of an hour on a CPU.
            matrix = _as_linear(module, weight).float()
            matrix = matrix.cuda() if torch.cuda.is_available() else matrix
            u, s, v = _singular(matrix, a.shape[0])
        root = (s / scale).sqrt()
        b.copy_(u * root)
        a.copy_(root[:, None] * v)
        module.register_buffer(INITIAL_A, a.detach().clone())
        module.register_buffer(INITIAL_B, b.detach().clone())


@torch.no_grad()
def subtract_initial(model: nn.Module, scale: float) -> None:
    """Take scale B0 A0 from the base weights, so that the model is what it was."""
    for module in layers_with(model, "lora_A").values():
        weight = module.get_base_layer().weight
        change = scale * (getattr(module, INITIAL_B).float() @ getattr(module, INITIAL_A).float())
        with gathered(weight):
            weight.copy_(weight.float() - _as_linear(module, change.to(weight.device)))


def _as_linear(module: Any, matrix: torch.Tensor) -> torch.Tensor:
    """[out, in] of a weight that may be [in, out] (Conv1D), and back."""
    return matrix.T if module.fan_in_fan_out else matrix


def _singular(matrix: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The largest `rank` singular values and vectors: U [out, r], S [r], V [r, in]."""
    if min(matrix.shape) <= _EXACT_UP_TO:
        u, s, v = torch.linalg.svd(matrix, full_matrices=False)
        return u[:, :rank], s[:rank], v[:rank]
    more = min(rank + 8, min(matrix.shape))
    u, s, v = torch.svd_lowrank(matrix, q=more, niter=_ITERATIONS)
    return u[:, :rank], s[:rank], v[:, :rank].T
