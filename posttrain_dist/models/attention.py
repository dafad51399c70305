"""Attention over one packed row: every sample attends to itself alone.

Registered with transformers' AttentionInterface, so that the model classes stay untouched. The
sample bounds `cu_seqlens_S` travel as a keyword through the backbone; no [T, T] mask is built.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from posttrain_dist.errors import ModelError
from posttrain_dist.models import Attention

SDPA, EAGER = "posttrain_sdpa", "posttrain_eager"


def register() -> None:
    """Make both implementations known to transformers; may be called again."""
    for name, attend in ((SDPA, _sdpa), (EAGER, _eager)):
        AttentionInterface.register(name, _packed(attend))
        AttentionMaskInterface.register(name, _no_mask)


def implementation(choice: Attention, attention_softcap: float | None) -> str:
    """The registered name for a config value.

    Raises:
        ModelError: sdpa asked for a model that caps its attention logits, which sdpa cannot do.
    """
    if choice is Attention.sdpa and attention_softcap:
        raise ModelError(
            f"the model caps its attention logits at {attention_softcap}, which sdpa cannot do",
            where="model.attention",
            fix="use model.attention=auto",
        )
    if choice is Attention.eager or attention_softcap:
        return EAGER
    return SDPA


def _no_mask(*args: Any, **kwargs: Any) -> None:
    return None


def _packed(attend: Any) -> Any:
    """Apply `attend` to each sample of the row; heads first: query [1, H, T, d]."""

    def attention(
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        *,
        scaling: float | None = None,
        dropout: float = 0.0,
        sliding_window: int | None = None,
        softcap: float | None = None,
        cu_seqlens: list[int],
        **_: Any,
    ) -> tuple[torch.Tensor, None]:
        if scaling is None:
            scaling = query.shape[-1] ** -0.5
        groups = query.shape[1] // key.shape[1]
        if groups > 1:
            key = key.repeat_interleave(groups, dim=1)
            value = value.repeat_interleave(groups, dim=1)
        outputs = []
        for start, end in pairwise(cu_seqlens):
            mask = _window_mask(end - start, sliding_window, query.device)
            q, k, v = (x[:, :, start:end] for x in (query, key, value))
            outputs.append(attend(q, k, v, mask, scaling, dropout, softcap))
        return torch.cat(outputs, dim=2).transpose(1, 2).contiguous(), None

    return attention


def _window_mask(
    length: int, sliding_window: int | None, device: torch.device
) -> torch.Tensor | None:
    """[L, L] booleans (True: may attend) where a window cuts a sample; None: plain causal."""
    if sliding_window is None or length <= sliding_window:
        return None
    distance = torch.arange(length, device=device)
    distance = distance[:, None] - distance[None, :]
    return (distance >= 0) & (distance < sliding_window)


def _sdpa(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float,
    dropout: float,
    softcap: float | None,
) -> torch.Tensor:
    if softcap:
        raise ModelError("a layer caps its attention logits, which sdpa cannot do")
    return torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=mask is None, scale=scaling
    )


def _eager(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float,
    dropout: float,
    softcap: float | None,
) -> torch.Tensor:
    """softmax(softcap · tanh(q kᵀ · scaling / softcap) + causal) v, softmax in float32."""
    scores = torch.matmul(q, k.transpose(-1, -2)) * scaling
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is None:
        length = q.shape[2]
        mask = torch.ones(length, length, dtype=torch.bool, device=q.device).tril()
    scores = scores.masked_fill(~mask, float("-inf"))
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(v.dtype)
    weights = torch.nn.functional.dropout(weights, p=dropout, training=dropout > 0)
    return torch.matmul(weights, v)
