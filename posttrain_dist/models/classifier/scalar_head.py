"""The scalar head of a reward model: transformers' module `score`, D -> 1 without bias.

It reads the state of an answer's last token, where transformers pools too. Products are made in
float32 whatever the weights are in: a reward of 16 bits has three digits, and what is compared is
the difference of two.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from posttrain_dist.errors import ConfigError, ModelError
from posttrain_dist.flow import Batch
from posttrain_dist.models.classifier import SCORE

# Largest difference of a reward from that of a sample alone, relative to the largest (at least 1):
# two ways to compute attention.
TOLERANCE = {torch.float32: 1e-3}
HALF = 1e-1


class ScalarHead:
    """Rewards of hidden states, through the real module `score`, so that ZeRO-3's hooks fire.

    Args:
        num_channels: C, rows of the channel tables.
    """

    def __init__(self, module: nn.Module, num_channels: int) -> None:
        self.module, self.num_channels = module, num_channels
        module.forward = _forward_of(module)

    def reward(self, hidden_ND: torch.Tensor) -> torch.Tensor:
        """float32 [N], differentiable."""
        reward_N1: torch.Tensor = self.module(hidden_ND)
        return reward_N1.squeeze(-1)


def _forward_of(module: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    def forward(hidden: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(hidden.float(), module.weight.float())

    return forward


def head_module(model: Any) -> nn.Module:
    """The output head of a loaded model: of a causal LM its lm_head, else `score`."""
    head: nn.Module | None = model.get_output_embeddings()
    return getattr(model, SCORE) if head is None else head


@torch.no_grad()
def draw_head(model: Any, seed: int) -> None:
    """Draw the weight of a new head: normal, of deviation 1 / sqrt(D + 1), by the seed alone.

    As Stiennon et al. (arXiv:2009.01325) begin: behind a norm of unit scale, rewards are then of
    size 1. With zeros instead the first update would have no gradient for the backbone.
    """
    weight: Any = getattr(model, SCORE).weight
    width = int(getattr(weight, "ds_shape", weight.shape)[-1])
    draw = torch.Generator().manual_seed(seed)
    values = torch.randn(1, width, generator=draw) / (width + 1) ** 0.5
    with _writable(weight):
        if weight.numel():  # of a sharded one, rank 0 hands out what it has
            weight.copy_(values)


def refuse_frozen_head(model: Any) -> None:
    """See that the head of a reward model is trained.

    Raises:
        ConfigError: it is not, and would keep the weights that were drawn.
    """
    if not getattr(model, SCORE).weight.requires_grad:
        raise ConfigError(
            f"leaves out {SCORE}.weight, the head of the reward model",
            where="tuning.train",
            fix=f"let the pattern match it, too: '...|{SCORE}[.]weight'",
        )


def compare_alone(model: Any, batch: Batch, reward_N: torch.Tensor) -> float:
    """The rewards of a row beside those that transformers gives each sample alone.

    Args:
        model: a transformers `…ForSequenceClassification`.
        batch: each target is the last token of a sample.
        reward_N: of the packed row.

    Returns:
        The largest difference.

    Raises:
        ModelError: it is more than rounding.
    """
    sample_N = batch.sample_N[: batch.num_targets].tolist()
    packed_attention = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        alone = [
            model(input_ids=_path(batch, sample)[None], use_cache=False).logits.float().reshape(1)
            for sample in sample_N
        ]
    finally:
        model.set_attn_implementation(packed_attention)
    if not alone:
        return 0.0
    alone_N = torch.cat(alone)
    difference = float((reward_N[: len(sample_N)] - alone_N).abs().max())
    largest = max(1.0, float(alone_N.abs().max()))
    dtype: torch.dtype = model.get_input_embeddings().weight.dtype
    if not difference <= TOLERANCE.get(dtype, HALF) * largest:
        raise ModelError(
            f"{type(model).__name__} gives a sample in a packed row another reward than the sample "
            f"alone: they differ by {difference:.2e}, the largest is {largest:.2e}",
            where="model.path",
            fix="nothing was trained; use an architecture that docs/models.md lists as trained",
        )
    return difference


def _path(batch: Batch, sample: int) -> torch.Tensor:
    """Tokens of a sample behind those of its parents."""
    parts: list[torch.Tensor] = []
    while sample >= 0:
        start, end = batch.cu_seqlens_S[sample : sample + 2]
        parts.insert(0, batch.input_ids_T[start:end])
        sample = batch.parent_S[sample]
    return torch.cat(parts)


def _writable(parameter: Any) -> AbstractContextManager[Any]:
    """A context where a parameter that DeepSpeed shards is whole, and may be written."""
    if not hasattr(parameter, "ds_id"):
        return nullcontext()
    zero: Any = sys.modules["deepspeed"].zero  # it sharded the parameter, so it is there
    return zero.GatheredParameters([parameter], modifier_rank=0)  # type: ignore[no-any-return]
