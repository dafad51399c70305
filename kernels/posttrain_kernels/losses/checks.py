"""What the public functions refuse; every message names the argument."""

from __future__ import annotations

import math

import torch

from posttrain_kernels.passes.targets import IGNORED
from posttrain_kernels.passes.vocab import VocabShard

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_head(
    hidden_TD: torch.Tensor,
    weight_VD: torch.Tensor,
    bias: torch.Tensor | None,
    shard: VocabShard | None,
) -> None:
    """Shapes and dtypes of the projection."""
    if hidden_TD.dim() != 2 or weight_VD.dim() != 2 or hidden_TD.shape[1] != weight_VD.shape[1]:
        raise ValueError(
            "hidden_TD and weight_VD must be [T, D] and [V, D], they are "
            f"{list(hidden_TD.shape)} and {list(weight_VD.shape)}"
        )
    _check_dtype("hidden_TD", hidden_TD)
    for name, tensor in (("weight_VD", weight_VD), ("bias", bias)):
        if tensor is not None and tensor.dtype != hidden_TD.dtype:
            raise ValueError(f"{name} is {tensor.dtype}, hidden_TD is {hidden_TD.dtype}")
    if bias is not None and bias.shape != weight_VD.shape[:1]:
        raise ValueError(f"bias must be [{len(weight_VD)}], it is {list(bias.shape)}")
    if shard is not None and not 0 <= shard.start <= shard.size - len(weight_VD):
        raise ValueError(
            f"shard: {len(weight_VD)} rows from {shard.start} do not lie in a vocabulary of "
            f"{shard.size}"
        )


def check_logits(logits_TV: torch.Tensor) -> None:
    """Shape and dtype of ready logits."""
    if logits_TV.dim() != 2:
        raise ValueError(f"logits_TV must be [T, V], it is {list(logits_TV.shape)}")
    _check_dtype("logits_TV", logits_TV)


def check_rows(
    num_rows: int,
    vocabulary: int,
    labels_N: torch.Tensor,
    supervised: torch.Tensor | None,
    token_weight: torch.Tensor | None = None,
) -> None:
    """Per-row arguments; ranges only on the CPU, for on a GPU the host would have to wait."""
    wanted = num_rows if supervised is None else len(supervised)
    for name, tensor in (("labels_N", labels_N), ("token_weight", token_weight)):
        if tensor is not None and tensor.shape != (wanted,):
            raise ValueError(f"{name} must be [{wanted}], it is {list(tensor.shape)}")
    for name, index in (("labels_N", labels_N), ("supervised", supervised)):
        if index is not None and index.dtype != torch.int64:
            raise ValueError(f"{name} must be int64, it is {index.dtype}")
    if labels_N.device.type == "cpu":
        used_N = labels_N[labels_N != IGNORED]
        _check_range("labels_N", used_N, vocabulary, f"only {IGNORED} means no label")
        if supervised is not None:
            _check_range("supervised", supervised, num_rows, "it indexes the rows")


def check_channel(channel: torch.Tensor | None, labels_N: torch.Tensor, num_channels: int) -> None:
    """The channel of each row."""
    if channel is None:
        return
    if channel.shape != labels_N.shape:
        raise ValueError(f"channel must be {list(labels_N.shape)}, it is {list(channel.shape)}")
    if num_channels < 1:
        raise ValueError("channel is given, so num_channels must be at least 1")
    if channel.device.type == "cpu":
        _check_range("channel", channel, num_channels, "raise num_channels")


def check_denominator(denominator: float | torch.Tensor, weight_N: torch.Tensor) -> None:
    """A number of 0 or more; 0 only where no row has a weight. A tensor is not looked at."""
    if isinstance(denominator, torch.Tensor):
        if denominator.numel() != 1:
            raise ValueError(f"denominator must be one number, it is {list(denominator.shape)}")
        return
    if not (math.isfinite(denominator) and denominator >= 0):
        raise ValueError(f"denominator must be 0 or more, it is {denominator}")
    if denominator == 0 and weight_N.device.type == "cpu" and bool(weight_N.any()):
        raise ValueError("denominator is 0, but some token has a weight")


def check_shape(
    softcap: float | None, logit_scale: float, z_loss: float, chunk_rows: int | None = None
) -> None:
    """The numbers that shape logits and work."""
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be above 0 or None, it is {softcap}")
    if not math.isfinite(logit_scale):
        raise ValueError(f"logit_scale must be finite, it is {logit_scale}")
    if not (math.isfinite(z_loss) and z_loss >= 0):
        raise ValueError(f"z_loss must be 0 or more, it is {z_loss}")
    if chunk_rows is not None and chunk_rows < 1:
        raise ValueError(f"chunk_rows must be at least 1, it is {chunk_rows}")


def _check_dtype(name: str, tensor: torch.Tensor) -> None:
    if tensor.dtype not in DTYPES:
        raise ValueError(f"{name} is {tensor.dtype}; use bfloat16, float16 or float32")


def _check_range(name: str, index_N: torch.Tensor, end: int, fix: str) -> None:
    if index_N.numel() == 0:
        return
    low, high = int(index_N.min()), int(index_N.max())
    if low < 0 or high >= end:
        wrong = low if low < 0 else high
        raise ValueError(f"{name} holds {wrong}, outside [0, {end}); {fix}")
