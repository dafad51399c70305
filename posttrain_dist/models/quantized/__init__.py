"""Base weights in 4-bit NormalFloat: which folders hold them, and what may be trained on them.

Reads config.json alone; imports no torch, transformers or bitsandbytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from posttrain_dist.errors import ModelError
from posttrain_dist.models.network.tensors import Linear, Network

# NF4 with double quantisation: 4 bits of each weight, for each block of 64 weights 8 bits of
# scale, for each 256 of these 32 bits (Dettmers et al., arXiv:2305.14314, section 3).
NF4_BYTES_PER_WEIGHT = 0.5 + 1 / 64 + 4 / (64 * 256)
BLOCK, NESTED_BLOCK = 64, 256  # weights, and scales, that share a scale
# The 16 values of a code and the 256 of a scale, and the mean of the scales: kept with each matrix.
_TABLE_BYTES = 4 * (16 + 256 + 1)
_UNQUANTISED = "use the folder of the unquantised model, with tuning=qlora to load it in NF4"


def holds_nf4(config: Mapping[str, Any]) -> bool:
    """Whether the weights of a config.json are stored in bitsandbytes' NF4."""
    return bool(config.get("quantization_config")) and not quantisation_fault(config)


def quantisation_fault(config: Mapping[str, Any]) -> tuple[str, str] | None:
    """(what, fix) of a config.json whose weights are quantised in another way than NF4."""
    found = config.get("quantization_config")
    if not found:
        return None
    if not isinstance(found, Mapping):
        return "its quantization_config is not a JSON object", "get the file again"
    method = str(found.get("quant_method", "a method that it does not name"))
    if method != "bitsandbytes":
        return f"holds quantised weights, by {method}, which cannot be trained on", _UNQUANTISED
    if not found.get("load_in_4bit"):
        return "holds quantised weights, by bitsandbytes in 8 bits, not in NF4", _UNQUANTISED
    kind = found.get("bnb_4bit_quant_type", "fp4")
    if kind != "nf4":
        return f"holds quantised weights, by bitsandbytes in {kind}, not in NF4", _UNQUANTISED
    return None


def nf4_tensor_bytes(size: int, value_bytes: int) -> tuple[int, int]:
    """(packed bytes, bytes of constants) of one matrix, as bitsandbytes 0.50 keeps it.

    Args:
        size: number of weights.
        value_bytes: of the dtype that the codes are stored as.
    """
    packed = (size + 1) // (2 * value_bytes) * value_bytes
    blocks = -(-size // BLOCK)
    return packed, blocks + 4 * -(-blocks // NESTED_BLOCK) + _TABLE_BYTES


def check_base(config: Mapping[str, Any], folder: Path, *, adapters: bool, fresh: bool) -> bool:
    """Whether the folder's weights are stored in NF4, once it is known that they can be used.

    Args:
        config: the folder's config.json, which `check_folder` accepted.
        adapters: the tuning trains something beside the base model, which stays as it is.
        fresh: no weights are read (`model.weights=random`).

    Raises:
        ModelError: weights in 4 bits cannot be trained themselves, or made afresh.
    """
    if not holds_nf4(config):
        return False
    where = str(folder / "config.json")
    if not adapters:
        raise ModelError(
            "holds weights in NF4 (quantization_config), which cannot be trained themselves",
            where=where,
            fix="use tuning=lora or another adapter, or the folder of the unquantised model",
        )
    if fresh:
        raise ModelError(
            "describes weights in NF4 (quantization_config), and model.weights is random",
            where=where,
            fix="use model.weights=load, or remove quantization_config from a copy of the file",
        )
    return True


def check_fits(
    network: Network, folder: Path, *, bytes_per_value: int, free_bytes: int, world: int
) -> None:
    """Refuse a base that does not fit where it is loaded: whole, on every rank.

    ZeRO-3 shards it only when it is there: packed weights cannot be made in parts.

    Raises:
        ModelError: with the bytes of each part, and what ZeRO-3 without NF4 would take.
    """
    needed = nf4_bytes(network, bytes_per_value)
    if needed <= free_bytes:
        return
    whole = network.num_parameters
    layers = sum(one.in_features * one.out_features for one in _linears(network))
    ranks = max(world, -(-whole * bytes_per_value // free_bytes))
    share = whole * bytes_per_value / ranks
    raise ModelError(
        f"takes {_gb(needed)} in NF4 on every rank before it is sharded ({layers / 1e9:.1f}B "
        f"weights of layers at {NF4_BYTES_PER_WEIGHT:.3f} bytes, "
        f"{(whole - layers) / 1e9:.1f}B of embeddings and head at "
        f"{bytes_per_value}), and {_gb(free_bytes)} of the device are free",
        where=str(folder),
        fix=f"use a larger GPU, or tuning.quantize=none engine=zero3, which shards while it loads: "
        f"{_gb(share)} on each of {ranks} ranks",
    )


def _gb(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.1f} GB"


def nf4_bytes(network: Network, bytes_per_value: int) -> int:
    """Memory of a base in NF4: the layers' matrices in 4 bits, embeddings and head are not.

    Args:
        bytes_per_value: of what is not quantised, 2 in bfloat16.
    """
    layers = [one.in_features * one.out_features for one in _linears(network)]
    rest = network.num_parameters - sum(layers)
    return sum(sum(nf4_tensor_bytes(size, bytes_per_value)) for size in layers) + (
        rest * bytes_per_value
    )


def _linears(network: Network) -> Iterator[Linear]:
    """Those of the layers."""
    return (one for one in network.linears() if one.part != "outside")
