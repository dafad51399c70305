"""Arguments of the public functions: checks that name the argument, and their preparation."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from posttrain_kernels.passes.targets import IGNORE_INDEX, LogitTransform, Targets
from posttrain_kernels.passes.vocab_shard import VocabShard

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
    expected = num_rows if supervised is None else len(supervised)
    for name, tensor in (("labels_N", labels_N), ("token_weight", token_weight)):
        if tensor is not None and tensor.shape != (expected,):
            raise ValueError(f"{name} must be [{expected}], it is {list(tensor.shape)}")
    for name, index in (("labels_N", labels_N), ("supervised", supervised)):
        if index is not None and index.dtype != torch.int64:
            raise ValueError(f"{name} must be int64, it is {index.dtype}")
    if labels_N.device.type == "cpu":
        given_N = labels_N[labels_N != IGNORE_INDEX]
        _check_range("labels_N", given_N, vocabulary, f"only {IGNORE_INDEX} means no label")
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
    """A number of 0 or more; 0 only where no row has a weight. A tensor's value is not read."""
    if isinstance(denominator, torch.Tensor):
        if denominator.numel() != 1:
            raise ValueError(f"denominator must be one number, it is {list(denominator.shape)}")
        return
    if not (math.isfinite(denominator) and denominator >= 0):
        raise ValueError(f"denominator must be 0 or more, it is {denominator}")
    if denominator == 0 and weight_N.device.type == "cpu" and bool(weight_N.any()):
        raise ValueError("denominator is 0, but some token has a weight")


def check_options(
    softcap: float | None, logit_scale: float, z_loss: float, chunk_rows: int | None = None
) -> None:
    """The numbers that transform logits, and the size of a chunk."""
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


# ------------------------------------------------------------------- for the implementations


def cast_for_autocast(
    hidden_TD: torch.Tensor, weight_VD: torch.Tensor, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """The projection's tensors in the dtype of autocast where that is on."""
    device = hidden_TD.device.type
    if not torch.is_autocast_enabled(device):
        return hidden_TD, weight_VD, bias
    dtype = torch.get_autocast_dtype(device)
    return hidden_TD.to(dtype), weight_VD.to(dtype), None if bias is None else bias.to(dtype)


class LossInputs(NamedTuple):
    """The rows that have a label: on a CPU K of N, on a GPU all N."""

    targets: Targets  # of the K
    hidden_rows: torch.Tensor | None  # int64 [K], of the K among the T; None: all, in order
    scale: torch.Tensor  # 1 / denominator
    weight_N: torch.Tensor  # 0 where there is no label
    label_rows: torch.Tensor | None  # int64 [K], of the K among the N; None: all


def prepare_inputs(
    labels_N: torch.Tensor,
    supervised: torch.Tensor | None,
    token_weight: torch.Tensor | None,
    denominator: float | torch.Tensor,
    transform: LogitTransform,
    dtype: torch.dtype,
    shard: VocabShard | None = None,
) -> LossInputs:
    """The public arguments as the implementations take them; weights in `dtype`.

    Raises:
        ValueError: the denominator is no number of 0 or more, or 0 with a weight to divide.
    """
    weight_N = row_weights(labels_N, token_weight, dtype)
    check_denominator(denominator, weight_N)
    label_rows, hidden_rows = select_labelled_rows(labels_N, supervised)
    columns = (labels_N, weight_N)
    labels_K, weight_K = (x if label_rows is None else x[label_rows] for x in columns)
    targets = Targets(labels_K.contiguous(), weight_K.contiguous(), transform, shard=shard)
    scale = inverse_denominator(denominator, weight_N)
    return LossInputs(targets, hidden_rows, scale, weight_N, label_rows)


def row_weights(
    labels_N: torch.Tensor, token_weight: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    """The weight of each row in `dtype`, 0 where it has no label."""
    labelled_N = labels_N != IGNORE_INDEX
    if token_weight is None:
        return labelled_N.to(dtype)
    return torch.where(labelled_N, token_weight.detach().to(dtype), 0)


def select_labelled_rows(
    labels_N: torch.Tensor, supervised: torch.Tensor | None
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """On a CPU the rows that have a label, among N and among T; None: all of them."""
    if labels_N.device.type != "cpu" or not bool((labels_N == IGNORE_INDEX).any()):
        return None, supervised
    label_rows = (labels_N != IGNORE_INDEX).nonzero()[:, 0]
    return label_rows, label_rows if supervised is None else supervised[label_rows]


def inverse_denominator(denominator: float | torch.Tensor, weight_N: torch.Tensor) -> torch.Tensor:
    """1 / denominator on the device, 0 where it is 0, in the dtype of `weight_N`."""
    if not isinstance(denominator, torch.Tensor):
        return weight_N.new_full((), 1 / denominator if denominator else 0.0)
    # Divided in the dtype of the argument, which may be wider.
    scalar = denominator.detach().reshape(())
    # To raise an error the host would wait for the device: 0 with a weight to divide gives NaN.
    for_zero = torch.where(weight_N.any(), torch.nan, 0.0)
    return torch.where(scalar == 0, for_zero, 1 / scalar).to(weight_N)
