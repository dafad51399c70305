"""Attention of a whole packed row in one kernel, on CUDA in half precision.

torch's own `torch.nn.attention.varlen` (from torch 2.11: scale and window, as used here) goes
before the package flash-attn, which caps logits and drops out too. Sample s of the row [T, H, d]
is [bounds[s], bounds[s + 1]); a window of W tokens is (W - 1, 0), itself and W - 1 before it.
"""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any, NamedTuple

import torch

from posttrain_dist.errors import ModelError
from posttrain_dist.flow import Batch
from posttrain_dist.models.shape import ModelShape

MAX_HEAD_DIM = 256  # of the flash kernels
CAPABILITY = (8, 0)  # ... and the oldest device that they run on


@dataclass(frozen=True, slots=True)
class AttentionRequirements:
    """What a model requires of its attention."""

    head_dim: int  # the widest
    value_head_dim: int | None = None  # where values are not as wide as keys
    softcap: float | None = None  # of the attention logits
    dropout: float = 0.0
    dtype: torch.dtype = torch.float32
    device: str = "cpu"

    @classmethod
    def of(cls, shape: ModelShape, dtype: torch.dtype) -> AttentionRequirements:
        """Of a model in `dtype`, on the device that is here."""
        return cls(
            head_dim=shape.widest_head,
            value_head_dim=shape.value_head_dim,
            softcap=shape.attention_softcap,
            dropout=shape.attention_dropout,
            dtype=dtype,
            device="cuda" if torch.cuda.is_available() else "cpu",
        )


def varlen_missing(requirements: AttentionRequirements) -> str:
    """Why torch's kernel cannot serve; empty where it can."""
    if requirements.softcap:
        return (
            f"the model caps its attention logits at {requirements.softcap}, which varlen cannot do"
        )
    if requirements.dropout:
        return "the model drops attention weights out, which varlen cannot do"
    return _kernel_missing(requirements) or (
        "" if _varlen_parameters() >= {"scale", "window_size"} else "torch is older than 2.11"
    )


def flash_missing(requirements: AttentionRequirements) -> str:
    """Why the package flash-attn cannot serve; empty where it can."""
    installed = importlib.util.find_spec("flash_attn") is not None
    return _kernel_missing(requirements) or ("" if installed else "flash-attn is not installed")


def _kernel_missing(requirements: AttentionRequirements) -> str:
    if requirements.device != "cuda":
        return f"there is no kernel for packed rows on {requirements.device}"
    if requirements.dtype not in (torch.bfloat16, torch.float16):
        return f"the kernels for packed rows do not compute in {requirements.dtype}"
    if requirements.head_dim > MAX_HEAD_DIM:
        return f"heads of {requirements.head_dim} are wider than {MAX_HEAD_DIM}"
    if requirements.value_head_dim not in (None, requirements.head_dim):
        return f"values of {requirements.value_head_dim} stand beside keys of another width"
    if torch.cuda.get_device_capability() < CAPABILITY:
        return "the device is older than compute capability 8.0"
    return ""


@cache
def _varlen_parameters() -> frozenset[str]:
    if importlib.util.find_spec("torch.nn.attention.varlen") is None:
        return frozenset()
    from torch.nn.attention.varlen import varlen_attn

    return frozenset(inspect.signature(varlen_attn).parameters)


class RowPrefix(NamedTuple):
    """Keys and values that every root of a row, and who follows it, attends to before its own.

    k of them in each of L layers; the keys are taken as they are, without rotation. R roots.
    """

    kv_L: tuple[torch.Tensor, ...]  # float32 [2, H, k, d] of each layer
    # For kernels of a whole row, with the k · R keys of prefixes before the T of tokens:
    place_U: torch.Tensor  # int64, where each of the k · R + T keys stands, sample by sample
    bounds_S: torch.Tensor  # int32, where the keys of samples begin
    max_seqlen: int  # keys of the longest sample

    @classmethod
    def of(cls, kv_L: tuple[torch.Tensor, ...], batch: Batch) -> RowPrefix:
        """Of the samples of `batch`."""
        num = kv_L[0].shape[2]
        roots = sum(parent < 0 for parent in batch.parent_S)
        places: list[int] = []
        bounds, given = [0], 0
        for (start, end), parent in zip(pairwise(batch.cu_seqlens_S), batch.parent_S, strict=True):
            if parent < 0:
                places += range(given, given + num)
                given += num
            places += range(num * roots + start, num * roots + end)
            bounds.append(len(places))
        device = batch.bounds_S.device
        return cls(
            kv_L,
            torch.tensor(places).to(device, non_blocking=True),
            torch.tensor(bounds, dtype=torch.int32).to(device, non_blocking=True),
            max(end - start for start, end in pairwise(bounds)),
        )


class AttentionArgs(NamedTuple):
    """What a layer hands to its attention over one packed row, and the bounds of its samples."""

    scaling: float
    dropout: float
    window: int | None
    softcap: float | None
    cu_seqlens: list[int]  # on the host
    bounds_S: torch.Tensor | None  # the same, int32 on the device; for kernels of a whole row
    max_seqlen: int | None
    parent_S: list[int] | None = None  # the sample that each one follows; -1: none
    prefix: RowPrefix | None = None
    prefix_kv: torch.Tensor | None = None  # of this layer: float32 [2, H, k, d]

    @property
    def bounds(self) -> tuple[torch.Tensor, int]:
        """Where samples begin, and how long the longest is.

        Raises:
            ModelError: samples follow others, whose keys a kernel of a whole row cannot share.
        """
        if self.parent_S is not None and max(self.parent_S) >= 0:
            raise ModelError(
                "the kernels for packed rows cannot share a prompt between its answers",
                where="model.attention",
                fix="use model.attention=sdpa (eager for a model that caps its attention logits)",
            )
        assert self.bounds_S is not None and self.max_seqlen is not None, "they come with the row"
        return self.bounds_S, self.max_seqlen

    @property
    def reach(self) -> tuple[int, int]:
        """(tokens before, tokens after) that a token attends to; -1: all."""
        return (-1 if self.window is None else self.window - 1), 0


class _Row(NamedTuple):
    """Queries, keys and values [T, H, d] of a row, and their bounds: those of keys may differ."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    bounds_q: torch.Tensor
    bounds_k: torch.Tensor
    max_q: int
    max_k: int

    @classmethod
    def of(cls, heads_first: Iterable[torch.Tensor], args: AttentionArgs) -> _Row:
        """Of [1, H, T, d], with the prefix before the keys of each sample.

        Where a sample has more keys than queries, both kernels align their causal mask and window
        to the last of each (bottom right), so that the prefix lies before the sample.
        """
        q, k, v = (x[0].transpose(0, 1) for x in heads_first)
        bounds_S, longest = args.bounds
        if args.prefix is None or args.prefix_kv is None:
            return cls(q, k, v, bounds_S, bounds_S, longest, longest)
        roots = (len(args.prefix.place_U) - len(k)) // max(1, args.prefix_kv.shape[2])

        def spliced(own: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
            # Repeated in float32, in which the gradients of all samples are added up.
            before = own.transpose(0, 1).repeat(roots, 1, 1).to(tokens.dtype)
            return torch.cat([before, tokens]).index_select(0, args.prefix.place_U)  # type: ignore[union-attr]

        k, v = spliced(args.prefix_kv[0], k), spliced(args.prefix_kv[1], v)
        return cls(q, k, v, bounds_S, args.prefix.bounds_S, longest, args.prefix.max_seqlen)


def varlen(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, args: AttentionArgs) -> torch.Tensor:
    """`torch.nn.attention.varlen.varlen_attn`; [1, H, T, d] in, [1, T, H, d] out."""
    row = _Row.of((q, k, v), args)
    from torch.nn.attention.varlen import varlen_attn

    assert not args.softcap and not args.dropout, "such a model is refused by varlen_missing"
    # torch 2.11 has no such parameter, and shares heads unasked.
    shared = {"enable_gqa": True} if "enable_gqa" in _varlen_parameters() else {}
    options: dict[str, Any] = {"scale": args.scaling, "window_size": args.reach, **shared}
    output = varlen_attn(*row, **options)
    assert isinstance(output, torch.Tensor)
    return output[None]


def flash_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, args: AttentionArgs
) -> torch.Tensor:
    """`flash_attn.flash_attn_varlen_func`; [1, H, T, d] in, [1, T, H, d] out."""
    row = _Row.of((q, k, v), args)
    from flash_attn import flash_attn_varlen_func  # type: ignore[import-not-found]

    output: torch.Tensor = flash_attn_varlen_func(
        *row,
        dropout_p=args.dropout,
        softmax_scale=args.scaling,
        causal=True,
        window_size=args.reach,
        softcap=args.softcap or 0.0,
    )
    return output[None]
