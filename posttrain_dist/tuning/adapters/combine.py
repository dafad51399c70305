"""Several LoRA adapters of one base model as one: weighted sums, with or without their conflicts.

linear        A = sum_i sqrt(w_i s_i) A_i and B alike, with s_i the scale of adapter i
ties          the same of the largest entries, where their signs agree (Yadav et al.,
              arXiv:2306.01708)
dare_linear   the same of random entries, scaled up by their density (Yu et al., arXiv:2311.03099)
dare_ties     both
cat           A and B side by side: exactly sum_i w_i s_i B_i A_i, of the sum of the ranks

All but `cat` combine A with A and B with B, as `peft` does, so that their product has cross terms.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from posttrain_dist.errors import ConfigError, ModelError
from posttrain_dist.tuning.saved_adapter import SavedAdapter

if TYPE_CHECKING:
    import torch


# Settings of a LoRA that is more than A and B, or has them in several sizes.
_MORE_THAN_LORA = (
    *("use_dora", "modules_to_save", "trainable_token_indices", "rank_pattern"),
    *("alpha_pattern", "lora_bias"),
)


class Combination(Enum):
    """How adapters are combined."""

    linear = "linear"
    ties = "ties"
    dare_linear = "dare_linear"
    dare_ties = "dare_ties"
    cat = "cat"

    @property
    def prunes(self) -> bool:
        """Whether it keeps a part of the entries only."""
        return self not in (Combination.linear, Combination.cat)


class WeightedAdapter(NamedTuple):
    """One of the adapters to combine."""

    folder: Path  # for errors
    saved: SavedAdapter
    weight: float

    @property
    def scale(self) -> float:
        """What its B A is multiplied by."""
        config = self.saved.config
        rank = int(config["r"])
        divisor = math.sqrt(rank) if config.get("use_rslora") else rank
        return float(config["lora_alpha"]) / divisor


def combine(
    adapters: Sequence[WeightedAdapter],
    combination: Combination,
    *,
    density: float | None = None,
    seed: int = 0,
) -> SavedAdapter:
    """One LoRA adapter, of the scale 1.

    Args:
        density: share of the entries that a pruning combination keeps.
        seed: of the random entries of DARE.

    Raises:
        ConfigError: a weight, the density or the number of adapters is out of its range.
        ModelError: the adapters are no plain LoRA, or not of the same targets and rank.
    """
    import torch

    _check_values(adapters, combination, density)
    for each in adapters:
        _check_plain(each)
    first, *others = adapters
    for each in others:
        _check_alike(first, each, same_rank=combination is not Combination.cat)
    tensors: dict[str, torch.Tensor] = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for name in first.saved.tensors:
            if ".lora_A." in name:
                other = name.replace(".lora_A.", ".lora_B.")
                tensors[name], tensors[other] = _combined(
                    adapters, name, other, combination, density
                )
    rank = int(first.saved.config["r"])
    if combination is Combination.cat:
        rank = sum(int(each.saved.config["r"]) for each in adapters)
    config = {**first.saved.config, "r": rank, "lora_alpha": rank, "use_rslora": False}
    return SavedAdapter(config, tensors)


def _combined(
    adapters: Sequence[WeightedAdapter],
    name_a: str,
    name_b: str,
    combination: Combination,
    density: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """A and B of one layer, in the dtype of the first adapter's."""
    import torch

    all_a = [each.saved.tensors[name_a].float() for each in adapters]
    all_b = [each.saved.tensors[name_b].float() for each in adapters]
    factors = [each.weight * each.scale for each in adapters]
    dtype = adapters[0].saved.tensors[name_a].dtype
    if combination is Combination.cat:
        a = torch.cat([factor * one for factor, one in zip(factors, all_a, strict=True)])
        return a.to(dtype), torch.cat(all_b, dim=1).to(dtype)
    # The sign of a factor stands on one side alone, else it would be lost in the product.
    of_a = torch.tensor([math.copysign(math.sqrt(abs(factor)), factor) for factor in factors])
    mix = _mixer(combination, density)
    return mix(all_a, of_a).to(dtype), mix(all_b, of_a.abs()).to(dtype)


def _mixer(
    combination: Combination, density: float | None
) -> Callable[[list[Any], torch.Tensor], torch.Tensor]:
    """peft's own function of matrices and weights."""
    from peft.utils import merge_utils

    if combination is Combination.linear:
        return merge_utils.task_arithmetic  # type: ignore[no-any-return]
    functions = {
        Combination.ties: merge_utils.ties,
        Combination.dare_linear: merge_utils.dare_linear,
        Combination.dare_ties: merge_utils.dare_ties,
    }
    function = functions[combination]
    return lambda matrices, weights: function(matrices, weights, density)


# -------------------------------------------------------------------------------- what fits


def _check_values(
    adapters: Sequence[WeightedAdapter], combination: Combination, density: float | None
) -> None:
    if len(adapters) < 2:
        raise ConfigError(
            "one adapter is no combination",
            where="ADAPTER",
            fix="give two or more folders, each with its weight: FOLDER:0.7 FOLDER:0.3",
        )
    for each in adapters:
        if not math.isfinite(each.weight) or each.weight == 0:
            raise ConfigError(
                f"has the weight {each.weight:g}",
                where=str(each.folder),
                fix="give a number other than 0; a negative one takes the adapter away",
            )
    if combination.prunes != (density is not None):
        raise ConfigError(
            f"{combination.name} keeps a part of the entries, and it is not said how large"
            if combination.prunes
            else f"{combination.name} keeps every entry",
            where="--density",
            fix="add --density 0.5" if combination.prunes else "leave it out",
        )
    if density is not None and not 0 < density < 1:
        raise ConfigError(
            f"is {density:g}, must be above 0 and below 1",
            where="--density",
            fix="0.5 keeps half of the entries",
        )


def _check_plain(adapter: WeightedAdapter) -> None:
    """Refuse what is no sum of weights and B A alone."""
    from posttrain_dist.tuning.injection.lora_files import NEUTRAL

    config, where = adapter.saved.config, str(adapter.folder)
    if config.get("peft_type") != "LORA":
        method = config.get("peft_type") or "a bottleneck"
        raise ModelError(
            f"is {method}, and only LoRA adapters are combined",
            where=where,
            fix="`posttrain chat` and `posttrain evaluate` switch between others: --adapter",
        )
    found = [key for key in _MORE_THAN_LORA if config.get(key)]
    if (initial := config.get("init_lora_weights", True)) not in NEUTRAL:
        found.append(f"init_lora_weights={initial!r}, which changes the base model's weights")
    if config.get("bias", "none") != "none":
        found.append(f"bias={config['bias']!r}")
    other = [name for name in adapter.saved.tensors if ".lora_A." not in name]
    other = [name for name in other if ".lora_B." not in name]
    if found or other:
        raise ModelError(
            f"is no plain LoRA: it has {found[0] if found else other[0]}",
            where=where,
            fix="combine adapters that hold A and B alone",
        )


def _check_alike(first: WeightedAdapter, other: WeightedAdapter, *, same_rank: bool) -> None:
    """Refuse adapters of other layers, sizes or ranks."""
    ranks = [int(each.saved.config["r"]) for each in (first, other)]
    if same_rank and ranks[0] != ranks[1]:
        raise ModelError(
            f"has the rank {ranks[1]}, and {first.folder} has {ranks[0]}",
            where=str(other.folder),
            fix="combine adapters of one rank, or use --method cat, whose rank is the sum",
        )
    differing = sorted(first.saved.tensors.keys() ^ other.saved.tensors.keys())
    if differing:
        raise ModelError(
            f"adapts other layers than {first.folder}: {differing[0]} is in one of them",
            where=str(other.folder),
            fix="combine adapters of the same targets",
        )
    for name, tensor in other.saved.tensors.items():
        side = 1 if ".lora_A." in name else 0
        if tensor.shape[side] != first.saved.tensors[name].shape[side]:
            raise ModelError(
                f"is for another base model: {name} has the shape {tuple(tensor.shape)}, that of "
                f"{first.folder} {tuple(first.saved.tensors[name].shape)}",
                where=str(other.folder),
                fix="combine adapters of one base model",
            )
