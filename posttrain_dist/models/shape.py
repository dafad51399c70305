"""What a model's config.json says about the way from hidden state to logits, and about memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class HeadShape:
    """logits = cap(scale · (hidden Wᵀ + b)), with cap(x) = softcap · tanh(x / softcap)."""

    logit_scale: float = 1.0
    softcap: float | None = None


def head_shape(config: Any) -> HeadShape:
    """Read the head's shape from a transformers config.

    Gemma 2 and 3 cap their logits (`final_logit_softcapping`), Cohere multiplies them
    (`logit_scale`), Granite divides them (`logits_scaling`).
    """
    scale = float(getattr(config, "logit_scale", None) or 1.0)
    scale /= float(getattr(config, "logits_scaling", None) or 1.0)
    return HeadShape(
        logit_scale=scale,
        softcap=getattr(config, "final_logit_softcapping", None),
    )
