"""Attention of a whole packed row in one kernel, on CUDA in half precision.

torch's own `torch.nn.attention.varlen` (from torch 2.11: scale and window, as used here) goes
before the package flash-attn, which caps logits and drops out too. Sample s of the row [T, H, d]
is [bounds[s], bounds[s + 1]); a window of W tokens is (W - 1, 0), itself and W - 1 before it.

Keys that several samples attend to, those of a shared prompt, are gathered once for each; queries,
projections and the MLP run once. Merging two partial results by their logsumexp would be silently
wrong here: the kernels ignore the gradient of the logsumexp in backward.
"""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

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


class RowKeys(NamedTuple):
    """Which keys each sample of a row attends to, for kernels of a whole row.

    Those of its path: the prefix of its root, the samples that it follows, itself. They are
    gathered from the k · R keys of prefixes, of R roots, with the T keys of tokens behind them.
    """

    place_U: torch.Tensor  # int64, where each of them stands, sample by sample
    bounds_S: torch.Tensor  # int32, where those of a sample begin
    max_seqlen: int  # keys of the longest path
    num_roots: int  # R

    @classmethod
    def of(cls, batch: Batch, prefix: int = 0) -> RowKeys:
        """Of the samples of `batch`, with so many keys before each root."""
        num_roots = sum(parent < 0 for parent in batch.parent_S)
        path_S: list[npt.NDArray[np.int64]] = []
        given = 0  # prefixes
        for (start, end), parent in zip(pairwise(batch.cu_seqlens_S), batch.parent_S, strict=True):
            if parent >= 0:
                before = path_S[parent]
            else:
                before = np.arange(given, given + prefix)
                given += prefix
            path_S.append(np.append(before, np.arange(start, end) + prefix * num_roots))
        lengths = [len(path) for path in path_S]
        bounds = np.array([0, *accumulate(lengths)], np.int32)
        return cls(
            _on(batch.bounds_S.device, np.concatenate(path_S)),
            _on(batch.bounds_S.device, bounds),
            max(lengths),
            num_roots,
        )


def _on(device: torch.device, values: npt.NDArray[Any]) -> torch.Tensor:
    """An array on `device`; the host does not wait for the copy."""
    tensor = torch.from_numpy(values)
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


class RowPrefix(NamedTuple):
    """Keys and values that every root of a row, and who follows it, attends to before its own.

    k of them in each of L layers; the keys are taken as they are, without rotation.
    """

    kv_L: tuple[torch.Tensor, ...]  # float32 [2, H, k, d] of each layer
    keys: RowKeys  # with k before each root

    @classmethod
    def of(cls, kv_L: tuple[torch.Tensor, ...], batch: Batch) -> RowPrefix:
        """Of the samples of `batch`."""
        return cls(kv_L, RowKeys.of(batch, kv_L[0].shape[2]))


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
    keys: RowKeys | None = None  # None: each sample attends to itself alone
    prefix_kv: torch.Tensor | None = None  # of this layer: float32 [2, H, k, d]

    @property
    def reach(self) -> tuple[int, int]:
        """(tokens before, tokens after) that a token attends to; -1: all."""
        return (-1 if self.window is None else self.window - 1), 0


class _Row(NamedTuple):
    """Queries [T, H, d] of a row, their keys and values, and the bounds of both."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    bounds_q: torch.Tensor
    bounds_k: torch.Tensor
    max_q: int
    max_k: int

    @classmethod
    def of(cls, heads_first: Iterable[torch.Tensor], args: AttentionArgs) -> _Row:
        """Of [1, H, T, d], with the keys of what each sample follows before its own.

        Where a sample has more keys than queries, both kernels align their causal mask and window
        to the last of each (bottom right), so that those keys lie before the sample.
        """
        q, k, v = (x[0].transpose(0, 1) for x in heads_first)
        bounds_S, longest, keys = args.bounds_S, args.max_seqlen, args.keys
        assert bounds_S is not None and longest is not None, "they come with the row"
        if keys is None:
            assert max(args.parent_S or [-1]) < 0, "a sample that follows another has more keys"
            return cls(q, k, v, bounds_S, bounds_S, longest, longest)
        if args.prefix_kv is not None:
            # Repeated in float32, in which the gradients of all samples are added up.
            before = (x.transpose(0, 1).repeat(keys.num_roots, 1, 1) for x in args.prefix_kv)
            k, v = (torch.cat([b.to(x.dtype), x]) for b, x in zip(before, (k, v), strict=True))
        k, v = (_Gather.apply(x, keys.place_U) for x in (k, v))  # type: ignore[no-untyped-call]
        return cls(q, k, v, bounds_S, keys.bounds_S, longest, keys.max_seqlen)


class _Gather(torch.autograd.Function):
    """x[places]; the gradients of a row that is taken several times add up in float32 at least.

    Hundreds of answers to one prompt would be lost in the rounding of a bfloat16 sum.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(places)
        ctx.num_rows = len(x)
        return x.index_select(0, places)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        (places,) = ctx.saved_tensors
        wide = torch.promote_types(grad.dtype, torch.float32)
        total = grad.new_zeros((ctx.num_rows, *grad.shape[1:]), dtype=wide)
        return total.index_add_(0, places, grad.to(wide)).to(grad.dtype), None


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
