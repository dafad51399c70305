"""What was trained beside a base model, merged into its weights: a stream of whole tensors.

The base is read from its files tensor by tensor: never more than one of them is in memory, beside
what was trained.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain_dist.errors import ConfigError, ModelError
from posttrain_dist.files import read_object
from posttrain_dist.tuning.adapters.base_tensors import Nf4Linears, base_tensors
from posttrain_dist.tuning.base import Tuning

if TYPE_CHECKING:
    import torch


class MergeInto(Enum):
    """Which weights of a base that was quantised in training take in what was trained."""

    original = "original"  # those of the files, in 16 or 32 bits
    dequantised = "dequantised"  # those that the adapter was trained beside


def refuse_unmergeable(tuning: Tuning, where: str) -> None:
    """Refuse what no weight of the model can take in.

    Raises:
        ConfigError: with the reason.
    """
    if tuning.whole_model:
        raise ConfigError(
            "this run trained the model itself, so there is nothing to merge",
            where=where,
            fix="leave --merge out",
        )
    if tuning.unmergeable:
        raise ConfigError(
            f"this cannot be merged: {tuning.unmergeable}",
            where=where,
            fix="leave --merge out: the adapter folder is served beside the base model",
        )


def merged_tensors(
    base: Path,
    tuning: Tuning,
    kept: Mapping[str, torch.Tensor],
    *,
    dtype: torch.dtype,
    into: MergeInto = MergeInto.original,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of a base model with what was trained in it.

    Args:
        base: a checked model folder; weights that it stores in NF4 come out of it.
        kept: every tensor that the tuning keeps, whole, by its name in the model.
        dtype: what they will be written in: a tensor is rounded once. NF4 is of weights in it.

    Yields:
        (name in the files of the base, tensor), each valid until the next.

    Raises:
        ModelError: something that was trained belongs to no tensor of the base.
    """
    network = read_object(base / "config.json")
    used = _Used(kept)
    into_nf4 = Nf4Linears(base) if into is MergeInto.dequantised else None
    for name, weight in base_tensors(base):
        if not weight.is_floating_point():
            yield name, weight
            continue
        if into_nf4 is not None and name in into_nf4:
            weight = into_nf4.rounded(name, weight.to(dtype))
        yield name, merged(tuning, name, weight, used, network, dtype)
    if unused := used.unused():
        raise ModelError(
            f"{len(unused)} trained tensors belong to no tensor of the base model, first of them "
            f"{unused[0]}",
            where=str(base),
            fix="is it the base model that the run started from?",
        )


def merged(
    tuning: Tuning,
    name: str,
    weight: torch.Tensor,
    kept: Mapping[str, torch.Tensor],
    network: Mapping[str, Any],
    dtype: torch.dtype,
) -> torch.Tensor:
    """One tensor of the base with what was trained in it, not yet rounded to a narrower `dtype`."""
    import torch

    return tuning.merge(name, weight.to(torch.promote_types(weight.dtype, dtype)), kept, network)


class _Used(Mapping[str, "torch.Tensor"]):
    """A mapping that knows which of its values were asked for."""

    def __init__(self, values: Mapping[str, torch.Tensor]) -> None:
        self._values, self._seen = values, set[str]()

    def __getitem__(self, name: str) -> torch.Tensor:
        value = self._values[name]
        self._seen.add(name)
        return value

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __contains__(self, name: object) -> bool:
        return name in self._values

    def unused(self) -> list[str]:
        return [name for name in self._values if name not in self._seen]
