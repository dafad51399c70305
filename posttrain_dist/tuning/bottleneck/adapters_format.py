"""Names and config of the files that the `adapters` library writes and reads (1.0 to 1.3).

    model.layers.0.mlp.bottleneck.down.weight
    model.layers.0.output_adapters.adapters.default.adapter_down.0.weight

There the adapter is a child of the decoder layer, beside its sublayers. The files of the Houlsby
and Pfeiffer placements compute the same there. A parallel adapter reads what stands before the norm
of the MLP there, and its input here, as in the paper's formula: the config then names an
architecture that the library does not know, so that it refuses the folder.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from posttrain_dist.errors import ModelError
from posttrain_dist.models.shape import ModelShape

if TYPE_CHECKING:
    import torch

VERSION = "adapters.1.3.0"
ADAPTER = "default"  # its name in the files
PARALLEL = "parallel_beside_the_mlp"

# What decoder layers call their attention and the module that ends their MLP.
_DEFAULT = ("self_attn", "mlp")
_SUBLAYERS = {
    **dict.fromkeys(("gpt2", "gpt_bigcode"), ("attn", "mlp")),
    **dict.fromkeys(("biogpt", "opt"), ("self_attn", "fc2")),  # their MLP is no module
    "gpt_neox": ("attention", "mlp"),
}
_LOCATIONS = ("attention_adapters", "output_adapters")
_MODULES = {"down": "adapter_down.0", "up": "adapter_up"}
_OURS = re.compile(r"(.+)\.(\w+)\.bottleneck\.(down|up)\.(weight|bias)")
_THEIRS = re.compile(
    rf"(.+)\.({'|'.join(_LOCATIONS)})\.adapters\.[^.]+\.(adapter_down\.0|adapter_up)\.(weight|bias)"
)
_SPELLINGS = {"swish": "silu"}


def sublayers(model_type: str) -> tuple[str, str]:
    """Names of the attention and of the MLP (or its last module) in a decoder layer."""
    return _SUBLAYERS.get(model_type, _DEFAULT)


def config_of(
    network: Mapping[str, Any],
    *,
    attention: bool,
    parallel: bool,
    reduction: int,
    nonlinearity: str,
    scale: float,
) -> dict[str, Any]:
    """adapter_config.json of the library: `BnConfig`, and what it says of the model."""
    config: dict[str, Any] = {
        "mh_adapter": attention,
        "output_adapter": True,
        "reduction_factor": reduction,
        "non_linearity": nonlinearity,
        "scaling": float(scale),  # a whole number is refused there
        "is_parallel": parallel,
        # The adapter reads the output of the sublayer as it is, before the residual is added.
        "original_ln_before": False,
        "original_ln_after": True,
        "residual_before_ln": True,
        "adapter_residual_before_ln": False,
        "ln_before": False,
        "ln_after": False,
        "init_weights": "mam_adapter",
        "use_gating": False,
        "inv_adapter": None,
        "inv_adapter_reduction_factor": None,
        "cross_adapter": False,
        "leave_out": [],
        "dropout": 0.0,
        "phm_layer": False,
    }
    if parallel:
        config["architecture"] = PARALLEL
    return {
        "config": config,
        "hidden_size": ModelShape.of(network).hidden_size,
        "model_class": next(iter(network.get("architectures") or []), None),
        "model_type": network.get("model_type"),
        "name": ADAPTER,
        "version": VERSION,
    }


def check_config(found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Compare what decides the function of two adapters.

    Raises:
        ModelError: they differ, or the folder is of another method.
    """
    own = found.get("config")
    if not isinstance(own, Mapping) or "reduction_factor" not in own:
        raise _refuse("is no bottleneck adapter: its config has no reduction_factor")
    ignored = ("init_weights",)
    differ = [
        f"{key} is {own.get(key)!r}, not {value!r}"
        for key, value in expected["config"].items()
        if key not in ignored and _SPELLINGS.get(str(own.get(key)), own.get(key)) != value
    ]
    if own.get("architecture") != expected["config"].get("architecture"):
        differ.append(f"architecture is {own.get('architecture')!r}")
    if differ:
        raise _refuse(f"computes something else: {'; '.join(differ)}")


def to_files(kept: Mapping[str, torch.Tensor], model_type: str) -> dict[str, torch.Tensor]:
    """Tensors by their names in the files of the library."""
    location = dict(zip(sublayers(model_type), _LOCATIONS, strict=True))
    found = {}
    for name, tensor in kept.items():
        match = _OURS.fullmatch(name)
        assert match is not None, name
        layer, sublayer, module, kind = match.groups()
        place = f"{layer}.{location[sublayer]}.adapters.{ADAPTER}"
        found[f"{place}.{_MODULES[module]}.{kind}"] = tensor
    return found


def from_files(
    tensors: Mapping[str, torch.Tensor], network: Mapping[str, Any], *, attention: bool
) -> dict[str, torch.Tensor]:
    """The inverse of `to_files`: every adapter of every layer, and nothing else.

    Raises:
        ModelError: a tensor is missing, or none of an adapter.
    """
    sublayer = dict(zip(_LOCATIONS, sublayers(str(network.get("model_type"))), strict=True))
    modules = {theirs: ours for ours, theirs in _MODULES.items()}
    found = {}
    for name, tensor in tensors.items():
        match = _THEIRS.fullmatch(name)
        if match is None or (match[2] == _LOCATIONS[0] and not attention):
            raise _refuse(f"has the tensor {name}, which is not of such an adapter")
        layer, location, module, kind = match.groups()
        found[f"{layer}.{sublayer[location]}.bottleneck.{modules[module]}.{kind}"] = tensor
    expected = ModelShape.of(network).num_layers * (2 if attention else 1) * 4
    if len(found) != expected:
        raise _refuse(f"has {len(found)} tensors, and the model's layers need {expected}")
    return found


def _refuse(what: str) -> ModelError:
    return ModelError(
        f"the adapter {what}",
        where="tuning.init_from",
        fix="continue it with the tuning and the base model that it was trained with",
    )
