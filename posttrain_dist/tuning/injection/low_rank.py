"""What LoRA's tensors make of a base weight, and exact changes of their form.

A and B are [r, in] and [out, r]; float32 inside.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from posttrain_dist.errors import ModelError
from posttrain_dist.tuning.injection.inject import ADAPTER
from posttrain_dist.tuning.injection.pissa import INITIAL_A, INITIAL_B
from posttrain_dist.tuning.saved_adapter import SavedAdapter

# Causal LMs whose linear weights are [in, out].
TRANSPOSED_TYPES = frozenset({"gpt2"})


class LowRank(NamedTuple):
    """The tensors of one layer."""

    a: torch.Tensor
    b: torch.Tensor
    magnitude: torch.Tensor | None  # [out], DoRA's
    initial_a: torch.Tensor | None  # PiSSA's
    initial_b: torch.Tensor | None

    @staticmethod
    def of(kept: Mapping[str, torch.Tensor], module: str) -> LowRank | None:
        """Those of a module of the base model; None: it is not changed."""
        a = kept.get(f"{module}.lora_A.{ADAPTER}.weight")
        b = kept.get(f"{module}.lora_B.{ADAPTER}.weight")
        if a is None or b is None:
            return None
        return LowRank(
            a.float(),
            b.float(),
            kept.get(f"{module}.lora_magnitude_vector.{ADAPTER}.weight"),
            kept.get(f"{module}.{INITIAL_A}"),
            kept.get(f"{module}.{INITIAL_B}"),
        )

    def delta(self, scale: float) -> torch.Tensor:
        """[out, in]: scale (B A - B0 A0)."""
        delta = self.b @ self.a
        if self.initial_a is not None and self.initial_b is not None:
            delta -= self.initial_b.float() @ self.initial_a.float()
        return delta.mul_(scale)

    def merged(self, weight: torch.Tensor, scale: float) -> torch.Tensor:
        """The weight [out, in] of one linear layer that computes the same as W, A and B.

        W + delta; with DoRA each of its rows has the length of the trained magnitude.
        """
        weight = weight.float() + self.delta(scale).to(weight.device)
        if self.magnitude is not None:
            length = torch.linalg.norm(weight, dim=1)
            weight = weight * (self.magnitude.float().to(weight.device) / length)[:, None]
        return weight

    def joined(self) -> tuple[torch.Tensor, torch.Tensor]:
        """A and B of twice the rank with B A = B A - B0 A0, for PiSSA; else as they are."""
        if self.initial_a is None or self.initial_b is None:
            return self.a, self.b
        a = torch.cat([self.a, self.initial_a.float()])
        return a, torch.cat([self.b, -self.initial_b.float()], dim=1)


def is_turned(
    weight: torch.Tensor,
    name: str,
    sizes: tuple[int | None, int | None],
    network: Mapping[str, Any] | None,
) -> bool:
    """Whether a weight is [in, out], as in GPT-2, and not [out, in] of these `sizes`.

    Args:
        sizes: None fits every size.

    Raises:
        ModelError: the weight fits neither way.
    """
    out, into = sizes
    rows, columns = weight.shape
    fits = out in (None, rows) and into in (None, columns)
    turned = out in (None, columns) and into in (None, rows)
    if not fits and not turned:
        raise ModelError(
            f"{name} has the shape {tuple(weight.shape)}, the adapter is for "
            f"{out or 'any'} x {into or 'any'}",
            where="model.path",
            fix="merge it into the base model that it was trained on",
        )
    if not fits or not turned:
        return turned
    if network is None:  # a square weight: only config.json says what its rows are
        assert name.split(".")[-2] not in ("c_attn", "c_proj", "c_fc"), f"{name} needs `network`"
        return False
    return network.get("model_type") in TRANSPOSED_TYPES


def as_plain_lora(saved: SavedAdapter) -> SavedAdapter:
    """The same function as LoRA with the scale alpha / rank, which every engine loads.

    rsLoRA's alpha / sqrt(rank) becomes part of alpha. (PiSSA is saved as plain LoRA of twice its
    rank, with A0 and B0 subtracted, from the beginning.)

    Raises:
        ModelError: there is no exact conversion.
    """
    config = saved.config
    method = config.get("peft_type")
    if method != "LORA" or config.get("use_dora"):
        name = "DoRA, whose magnitudes are" if method == "LORA" else f"{method}, which is"
        raise ModelError(
            f"the adapter is {name} no low-rank change of the weights",
            fix="merge it into the model: posttrain export RUN OUT --merge",
        )
    if not config.get("use_rslora"):
        return saved
    rank = int(config["r"])
    alpha = number(float(config["lora_alpha"]) * math.sqrt(rank))
    return SavedAdapter({**config, "use_rslora": False, "lora_alpha": alpha}, saved.tensors)


def number(value: float) -> float | int:
    """A whole number as an int, which readers of `lora_alpha` expect."""
    nearest = round(value)
    return nearest if math.isclose(value, nearest, rel_tol=1e-12) else value
