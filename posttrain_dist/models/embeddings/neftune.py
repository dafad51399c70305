"""Noise on the input embeddings while training: NEFTune (Jain et al., arXiv:2310.05914).

    x_L + uniform(-1, 1) · alpha / sqrt(L · D)

L are the tokens of a sample, and of those that it follows. In the paper they are those of its row,
padding left out; here a row has many samples, and packing must not change their noise.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from posttrain_dist.flow import Batch


class EmbeddingNoise:
    """The noise of a model whose input embeddings are the module `embeddings`.

    A hook on the module, because what the model does with token ids beside (Gemma 4 has more
    embeddings of them) goes on. Drawn by torch's generator, which the loop seeds in every step.

    Args:
        alpha: above 0, such as 5.
    """

    def __init__(self, alpha: float, embeddings: nn.Module) -> None:
        self._alpha = alpha
        self._scale_T: torch.Tensor | None = None  # of the forward that comes
        embeddings.register_forward_hook(self._hook)

    def apply(self, embeds_TD: torch.Tensor | None, batch: Batch) -> torch.Tensor | None:
        """Add noise to a row, or to what its embeddings will be in the forward that follows.

        Args:
            embeds_TD: None: the module itself is called by the forward.
            batch: virtual tokens, whose ids are below 0, get none and count for no length.
        """
        scale_T = self._scale(batch)
        if embeds_TD is None:
            self._scale_T = scale_T
            return None
        return _noisy(embeds_TD, scale_T)

    def _scale(self, batch: Batch) -> torch.Tensor:
        """alpha / sqrt(L) of each token, float32; 0 for virtual ones."""
        real_T = batch.input_ids_T >= 0
        bounds_S = batch.bounds_S.long()
        before_T = torch.cat([bounds_S.new_zeros(1), real_T.long().cumsum(0)])
        length_S = before_T[bounds_S[1:]] - before_T[bounds_S[:-1]]
        for sample, parent in enumerate(batch.parent_S):
            if parent >= 0:
                length_S[sample] += length_S[parent]
        scale_S = self._alpha / length_S.clamp(min=1).float().sqrt()
        place_T = torch.arange(len(real_T), device=real_T.device)
        sample_T = torch.searchsorted(bounds_S[1:].contiguous(), place_T, right=True)
        return scale_S[sample_T] * real_T

    def _hook(self, module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor | None:
        scale_T, self._scale_T = self._scale_T, None
        return None if scale_T is None else _noisy(output, scale_T)


def _noisy(embeds: torch.Tensor, scale_T: torch.Tensor) -> torch.Tensor:
    """`embeds` [..., T, D] with noise; the gradient passes as it is."""
    noise = torch.empty_like(embeds, dtype=torch.float32, requires_grad=False).uniform_(-1, 1)
    noise *= (scale_T / embeds.shape[-1] ** 0.5)[:, None]
    return embeds + noise.to(embeds.dtype)
