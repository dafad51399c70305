"""The tuning that an adapter folder was made by, so that a model gets the same modules again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from posttrain_dist.errors import ModelError
from posttrain_dist.tuning.base import AdapterTuning
from posttrain_dist.tuning.saved_adapter import SavedAdapter

# Settings of peft's LoRA that change what it computes, and that ours does not have.
_FOREIGN_LORA = ("rank_pattern", "alpha_pattern", "lora_bias", "layers_to_transform")


def tuning_from_adapter(folder: Path) -> AdapterTuning:
    """A tuning whose `attach` puts the adapter of a folder on a base model.

    Args:
        folder: of one adapter: ours, of plain `peft`, or in the format of the `adapters` library.

    Raises:
        ModelError: there is none, or it is of a method or kind that this library does not train.
    """
    from posttrain_dist.tuning.adapters.adapter_folder import read_adapter

    saved = read_adapter(folder)
    config = saved.config
    makers = {
        "LORA": _lora,
        "IA3": _ia3,
        "PROMPT_TUNING": _prompt,
        "P_TUNING": _prompt,  # its MLP has made the prompt that is saved
        "PREFIX_TUNING": _prefix,
        None: _bottleneck,
    }
    method = config.get("peft_type")
    if method not in makers:
        raise _refusal(folder, f"is of the method {method}")
    foreign = [key for key in _FOREIGN_LORA if method == "LORA" and config.get(key)]
    if foreign:
        raise _refusal(folder, f"sets {foreign[0]}")
    try:
        tuning = makers[method](saved)
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(
            f"lacks what its method needs: {error}",
            where=str(folder / "adapter_config.json"),
            fix="get the adapter again",
        ) from error
    tuning.init_from = str(folder)
    return tuning


def _refusal(folder: Path, what: str) -> ModelError:
    return ModelError(
        f"{what}, which no tuning of this library has",
        where=str(folder / "adapter_config.json"),
        fix="`posttrain chat BASE --adapter NAME=FOLDER` takes it through peft",
    )


def _lora(saved: SavedAdapter) -> AdapterTuning:
    from posttrain_dist.tuning.injection.lora_files import modules_in_full
    from posttrain_dist.tuning.lora import Lora

    config = saved.config
    return Lora(
        rank=int(config["r"]),
        alpha=float(config["lora_alpha"]),
        targets=_names(config["target_modules"]),
        rslora=bool(config.get("use_rslora")),
        dora=bool(config.get("use_dora")),
        modules_to_save=modules_in_full(saved),
    )


def _ia3(saved: SavedAdapter) -> AdapterTuning:
    from posttrain_dist.tuning.ia3 import Ia3

    return Ia3(targets=_names(saved.config["target_modules"]))


def _names(targets: Any) -> Any:
    """A pattern as it is; of names, those that the folder lists."""
    return targets if isinstance(targets, str) else sorted(targets)


def _prompt(saved: SavedAdapter) -> AdapterTuning:
    from posttrain_dist.tuning.prompt_tuning import Prompt

    return Prompt(tokens=int(saved.config["num_virtual_tokens"]))


def _prefix(saved: SavedAdapter) -> AdapterTuning:
    from posttrain_dist.tuning.prefix_tuning import Prefix

    return Prefix(tokens=int(saved.config["num_virtual_tokens"]))


def _bottleneck(saved: SavedAdapter) -> AdapterTuning:
    from posttrain_dist.tuning.bottleneck import Bottleneck, Nonlinearity, Placement

    own = saved.config["config"]
    placement = Placement.parallel if own.get("is_parallel") else Placement.pfeiffer
    if own.get("mh_adapter"):
        placement = Placement.houlsby
    name = {"swish": "silu"}.get(own["non_linearity"], own["non_linearity"])
    return Bottleneck(
        placement=placement,
        reduction=int(own["reduction_factor"]),
        nonlinearity=Nonlinearity[name],
        scale=float(own.get("scaling", 1.0)),
    )
