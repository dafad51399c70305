"""Optimizer: parameter groups, learning rate, the torch optimizer itself."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch

from posttrain_dist.engine import WARMUP_RATIO, AdamW, Schedule


def learning_rate(config: AdamW, step: int, total_steps: int) -> float:
    """The rate of update `step` (1 is the first): linear warm-up, then the schedule."""
    assert config.lr is not None, "a completed config has one"
    warmup = warmup_steps(config, total_steps)
    if step < warmup:
        return config.lr * step / warmup
    progress = min(1.0, (step - warmup) / max(1, total_steps - warmup))
    if config.schedule is Schedule.constant:
        return config.lr
    if config.schedule is Schedule.linear:
        share = 1.0 - progress
    else:
        share = 0.5 * (1.0 + math.cos(math.pi * progress))
    return config.lr * (config.min_lr_ratio + (1.0 - config.min_lr_ratio) * share)


def warmup_steps(config: AdamW, total_steps: int) -> int:
    """Updates in which the rate rises: as many as were set, or a share of all."""
    if config.warmup_steps is not None:
        return config.warmup_steps
    ratio = WARMUP_RATIO if config.warmup_ratio is None else config.warmup_ratio
    return math.ceil(ratio * total_steps)


def parameter_groups(
    named_parameters: Iterable[tuple[str, torch.nn.Parameter]], weight_decay: float
) -> list[dict[str, Any]]:
    """Matrices with weight decay; norms and biases (fewer than two dimensions) without.

    Under ZeRO-3 a parameter is a flat shard; its true shape is then its `ds_shape`.
    """
    decayed: list[torch.nn.Parameter] = []
    plain: list[torch.nn.Parameter] = []
    for _, parameter in named_parameters:
        if parameter.requires_grad:
            shape = getattr(parameter, "ds_shape", parameter.shape)
            (decayed if len(shape) >= 2 else plain).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def adamw(groups: list[dict[str, Any]], config: AdamW) -> torch.optim.AdamW:
    """torch's fused AdamW, which exists on CPU and CUDA."""
    return torch.optim.AdamW(
        groups, lr=config.lr or 0.0, betas=(config.beta1, config.beta2), eps=config.eps, fused=True
    )
