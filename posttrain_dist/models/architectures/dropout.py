"""Dropout of a loaded model: modules of their own, and rates that attentions read."""

from __future__ import annotations

import logging
from typing import Any

from torch import nn

_log = logging.getLogger(__name__)


def switch_off_dropout(model: nn.Module) -> dict[str, float]:
    """Set every rate of dropout to 0, of what a tuning inserted too.

    The modules stay in training mode, by which activation checkpointing goes.

    Returns:
        Name -> what the rate was, of those above 0.
    """
    found: dict[str, float] = {}
    for name, module in model.named_modules():
        values: dict[str, Any] = vars(module)
        names = ["p"] if isinstance(module, nn.modules.dropout._DropoutNd) else []
        names += [key for key in values if _is_rate(key)]
        for key in names:
            if isinstance(values[key], float) and values[key] > 0:
                found[f"{name}.{key}"] = values[key]
                setattr(module, key, 0.0)
    config: Any = model.config
    for key, value in list(vars(config).items()):  # which some forwards ask
        if _is_rate(key) and isinstance(value, float) and value > 0:
            found[f"config.{key}"] = value
            setattr(config, key, 0.0)
    if found:
        _log.info("dropout is off: %s", ", ".join(f"{n} was {v}" for n, v in found.items()))
    return found


def _is_rate(name: str) -> bool:
    """attention_dropout, hidden_dropout_prob, attn_pdrop, dropout."""
    return "dropout" in name or name.endswith("pdrop")
