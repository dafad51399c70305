"""Optimizer: parameter groups, learning rate, the torch optimizer itself."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

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


@dataclass(frozen=True, slots=True)
class ParameterRules:
    """What the optimizer asks of the tuning, by a parameter's name in the causal LM.

    Attributes:
        decays: whether weight decay applies, from name and shape.
        lr_ratio: what the learning rate is multiplied by.
        sparse: whether steps without any gradient are normal for it (rows of rare tokens).
    """

    decays: Callable[[str, Sequence[int]], bool] = lambda name, shape: len(shape) >= 2
    lr_ratio: Callable[[str], float] = lambda name: 1.0
    sparse: Callable[[str], bool] = lambda name: False


def causal_lm_name(name: str) -> str:
    """The name in the causal LM of what is called `name` in a policy."""
    return name.removeprefix("causal_lm.")


def trained_parameters(policy: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are trained, by their names in the causal LM."""
    return {causal_lm_name(n): p for n, p in policy.named_parameters() if p.requires_grad}


def whole_shape(parameter: torch.Tensor) -> torch.Size:
    """The shape of a parameter; under ZeRO-3 it is a flat shard, and this its `ds_shape`."""
    return getattr(parameter, "ds_shape", parameter.shape)


def parameter_groups(
    named: Mapping[str, nn.Parameter], weight_decay: float, rules: ParameterRules
) -> list[dict[str, Any]]:
    """One group for each pair of weight decay and learning-rate ratio that occurs.

    None is empty: DeepSpeed would drop it and then find one group too few.
    """
    groups: dict[tuple[bool, float], list[nn.Parameter]] = {}
    for name, parameter in named.items():
        decays = rules.decays(name, whole_shape(parameter))
        groups.setdefault((not decays, rules.lr_ratio(name)), []).append(parameter)
    return [
        {"params": members, "weight_decay": 0.0 if plain else weight_decay, "lr_ratio": ratio}
        for (plain, ratio), members in sorted(groups.items(), key=lambda group: group[0])
    ]


def set_learning_rate(groups: Iterable[dict[str, Any]], lr: float) -> None:
    """Give each group its share of `lr`."""
    for group in groups:
        group["lr"] = lr * group.get("lr_ratio", 1.0)  # groups of an older checkpoint have none


def adamw(groups: list[dict[str, Any]], config: AdamW) -> torch.optim.AdamW:
    """torch's fused AdamW, which exists on CPU and CUDA."""
    return torch.optim.AdamW(
        groups, lr=config.lr or 0.0, betas=(config.beta1, config.beta2), eps=config.eps, fused=True
    )
