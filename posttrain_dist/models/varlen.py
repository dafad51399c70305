"""Attention of a whole packed row in one kernel, on CUDA in half precision.

torch's own `torch.nn.attention.varlen` (from torch 2.11: scale and window, as used here) goes
before the package flash-attn, which caps logits and drops out too. Sample s of the row [T, H, d]
is [bounds[s], bounds[s + 1]); a window of W tokens is (W - 1, 0), itself and W - 1 before it.
"""

from __future__ import annotations

import importlib.util
import inspect
from functools import cache
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from posttrain_dist.models.attention import Needs

MAX_HEAD_DIM = 256  # of the flash kernels
CAPABILITY = (8, 0)  # ... and the oldest device that they run on


def varlen_missing(needs: Needs) -> str:
    """Why torch's kernel cannot serve; empty where it can."""
    if needs.softcap:
        return f"the model caps its attention logits at {needs.softcap}, which varlen cannot do"
    if needs.dropout:
        return "the model drops attention weights out, which varlen cannot do"
    return _kernel_missing(needs) or (
        "" if _varlen_parameters() >= {"scale", "window_size"} else "torch is older than 2.11"
    )


def flash_missing(needs: Needs) -> str:
    """Why the package flash-attn cannot serve; empty where it can."""
    installed = importlib.util.find_spec("flash_attn") is not None
    return _kernel_missing(needs) or ("" if installed else "flash-attn is not installed")


def _kernel_missing(needs: Needs) -> str:
    if needs.device != "cuda":
        return f"there is no kernel for packed rows on {needs.device}"
    if needs.dtype not in (torch.bfloat16, torch.float16):
        return f"the kernels for packed rows do not compute in {needs.dtype}"
    if needs.head_dim > MAX_HEAD_DIM:
        return f"heads of {needs.head_dim} are wider than {MAX_HEAD_DIM}"
    if torch.cuda.get_device_capability() < CAPABILITY:
        return "the device is older than compute capability 8.0"
    return ""


@cache
def _varlen_parameters() -> frozenset[str]:
    if importlib.util.find_spec("torch.nn.attention.varlen") is None:
        return frozenset()
    from torch.nn.attention.varlen import varlen_attn

    return frozenset(inspect.signature(varlen_attn).parameters)


def varlen(
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
    bounds_S: torch.Tensor,
    max_seqlen: int,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """`torch.nn.attention.varlen.varlen_attn` in the form of transformers: [1, H, T, d] in."""
    from torch.nn.attention.varlen import varlen_attn

    assert not softcap and not dropout, "such a model does not come here: see varlen_missing"
    # torch 2.11 has no such parameter, and shares heads unasked.
    shared = {"enable_gqa": True} if "enable_gqa" in _varlen_parameters() else {}
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    output = varlen_attn(
        q,
        k,
        v,
        bounds_S,
        bounds_S,
        max_seqlen,
        max_seqlen,
        scale=scaling,
        window_size=_window(sliding_window),
        **shared,  # type: ignore[arg-type]
    )
    assert isinstance(output, torch.Tensor)
    return output[None], None


def flash_attention(
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
    bounds_S: torch.Tensor,
    max_seqlen: int,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """`flash_attn.flash_attn_varlen_func` in the form of transformers: [1, H, T, d] in."""
    from flash_attn import flash_attn_varlen_func  # type: ignore[import-not-found]

    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    output = flash_attn_varlen_func(
        q,
        k,
        v,
        bounds_S,
        bounds_S,
        max_seqlen,
        max_seqlen,
        dropout_p=dropout,
        softmax_scale=scaling,
        causal=True,
        window_size=_window(sliding_window),
        softcap=softcap or 0.0,
    )
    return output[None], None


def _window(sliding_window: int | None) -> tuple[int, int]:
    """(tokens before, tokens after) that a token attends to; -1: all."""
    return (-1 if sliding_window is None else sliding_window - 1), 0
