"""LoRA as `peft` saves it: adapter_config.json, and tensors under the names of the file."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Protocol

import torch

from posttrain_dist.errors import ModelError
from posttrain_dist.models.classifier import SCORE
from posttrain_dist.tuning.injection.inject import ADAPTER, file_name, model_name
from posttrain_dist.tuning.injection.low_rank import TRANSPOSED_TYPES, LowRank, number
from posttrain_dist.tuning.injection.pissa import INITIAL_A, INITIAL_B
from posttrain_dist.tuning.injection.targets import ends_with
from posttrain_dist.tuning.saved_adapter import SavedAdapter

_ROWS = ".token_adapter.trainable_tokens_delta"
_IDS = ".token_adapter.token_ids"  # of added tokens; see models/embeddings/added_tokens.py
_A = f".lora_A.{ADAPTER}.weight"
_INSERTED = (".lora_A.", ".lora_B.", ".lora_magnitude_vector.", ".token_adapter.")
# Initialisations of peft that leave the base as it is; the others change it.
NEUTRAL = (True, False, "gaussian", "orthogonal", "eva", None)


class LoraLike(Protocol):
    """A `Lora`, whose file may not be imported here: it imports this one."""

    rank: int
    alpha: float
    dropout: float
    rslora: bool
    dora: bool
    init: Any

    def kept(self, name: str) -> bool:
        """See `Tuning.kept`."""

    @property
    def scale(self) -> float:
        """What B A is multiplied by."""


def to_files(
    tuning: LoraLike, kept: Mapping[str, torch.Tensor], network: Mapping[str, Any]
) -> SavedAdapter:
    """See `Lora.to_adapter`."""
    targets = [name.removesuffix(_A) for name in kept if name.endswith(_A)]
    in_full = [n for n in kept if not _is_inserted(n)]
    tensors: dict[str, torch.Tensor] = {}
    joined = False
    for name, tensor in kept.items():
        if name.endswith((INITIAL_A, INITIAL_B, _IDS)):
            continue
        tensors[file_name(name)] = tensor
    for target in targets:
        parts = LowRank.of(kept, target)
        if parts is not None and parts.initial_a is not None:
            joined = True
            a, b = parts.joined()
            dtype = kept[target + _A].dtype
            tensors[file_name(target + _A)] = a.to(dtype)
            tensors[file_name(f"{target}.lora_B.{ADAPTER}.weight")] = b.to(dtype)
    rank = 2 * tuning.rank if joined else tuning.rank
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if f"{SCORE}.weight" in kept else "CAUSAL_LM",
        "inference_mode": True,
        "r": rank,
        "lora_alpha": number(tuning.scale * rank if joined else tuning.alpha),
        "lora_dropout": tuning.dropout,
        "use_rslora": tuning.rslora and not joined,
        "use_dora": tuning.dora,
        "bias": "none",
        "fan_in_fan_out": network.get("model_type") in TRANSPOSED_TYPES,
        "target_modules": targets,
        "modules_to_save": list(dict.fromkeys(n.rpartition(".")[0] for n in in_full)) or None,
        "rank_pattern": {},
        "alpha_pattern": {},
        "trainable_token_indices": {
            name.removesuffix(_IDS): ids.tolist()
            for name, ids in kept.items()
            if name.endswith(_IDS)
        }
        or None,
        "init_lora_weights": True,
    }
    return SavedAdapter(config, {n: t.detach().contiguous() for n, t in tensors.items()})


def from_files(tuning: LoraLike, saved: SavedAdapter) -> dict[str, torch.Tensor]:
    """See `Lora.from_adapter`."""
    joined = tuning.init.name == "pissa"
    _check(tuning, saved.config, joined)
    found: dict[str, torch.Tensor] = {}
    for file_key, tensor in _once(saved).items():
        name = model_name(file_key)
        layer = name.partition(".lora_")[0]
        if joined and name.endswith(_A):
            found[name], found[f"{layer}.{INITIAL_A}"] = torch.split(tensor, tuning.rank)
        elif joined and ".lora_B." in name:
            found[name], initial = torch.split(tensor, tuning.rank, dim=1)
            found[f"{layer}.{INITIAL_B}"] = -initial
        else:
            found[name] = tensor
    for name in [name for name in found if name.endswith(_ROWS)]:
        module = name.removesuffix(_ROWS)
        found[module + _IDS] = torch.tensor(_token_ids(saved.config, module))
    modules = dict.fromkeys(n.rpartition(".")[0] for n in found if not tuning.kept(n))
    if modules:
        raise _other(
            f"trains {', '.join(modules)} in full",
            f"set 'tuning.modules_to_save=[{','.join(modules)}]'",
        )
    return found


def modules_in_full(saved: SavedAdapter) -> list[str]:
    """Modules that an adapter trains in full, by its tensors: `peft` takes ends of names."""
    names = [name for name in map(model_name, _once(saved)) if not _is_inserted(name)]
    return sorted({name.rpartition(".")[0] for name in names})


def _once(saved: SavedAdapter) -> dict[str, torch.Tensor]:
    """Tensors; `peft` writes tables of tokens twice if they have grown."""
    every = saved.tensors
    return {
        name: tensor
        for name, tensor in every.items()
        if ".modules_to_save." not in name or name.replace(".modules_to_save", "") not in every
    }


def _token_ids(config: Mapping[str, Any], module: str) -> list[int]:
    """Of the trained rows of a module; `peft` takes names' ends too, or one list for all."""
    trained = config.get("trainable_token_indices") or []
    if not isinstance(trained, Mapping):
        return list(trained)
    return next((list(ids) for end, ids in trained.items() if ends_with(module, end)), [])


def _check(tuning: LoraLike, config: Mapping[str, Any], joined: bool) -> None:
    """Refuse an adapter that these tensors' names and shapes would not tell from another."""
    method = config.get("peft_type")
    if method != "LORA":
        raise _other(f"is of the method {method}, not LoRA", "choose that tuning")
    initial = config.get("init_lora_weights", True)
    if initial not in NEUTRAL:
        raise _other(
            f"was begun with init_lora_weights={initial!r}, which changes the base model's weights",
            "convert it to plain LoRA with peft first (path_initial_model_for_weight_conversion)",
        )
    for key in ("rank_pattern", "alpha_pattern"):
        if config.get(key):
            raise _other(f"has a {key}, ranks or scales of single layers", "merge it, or retrain")
    if config.get("bias", "none") != "none":
        raise _other(f"trains biases (bias={config['bias']!r})", "merge it into its base model")
    rank = int(config.get("r", 0))
    expected = 2 * tuning.rank if joined else tuning.rank
    if rank != expected:
        half = " (PiSSA's are saved with twice their rank)" if joined else ""
        raise _other(f"has the rank {rank}, this tuning {expected}{half}", "set tuning.rank to it")
    dora = bool(config.get("use_dora"))
    if dora != tuning.dora:
        raise _other(f"has use_dora={dora}", f"set tuning.dora={str(dora).lower()}")
    divisor = math.sqrt(rank) if config.get("use_rslora") else rank
    scale = float(config.get("lora_alpha", 0)) / divisor
    if not math.isclose(scale, tuning.scale, rel_tol=1e-6):
        raise _other(
            f"has the scale {scale:.4g}, this tuning {tuning.scale:.4g}",
            f"set tuning.alpha={config.get('lora_alpha')} and "
            f"tuning.rslora={str(bool(config.get('use_rslora'))).lower()}",
        )


def _is_inserted(name: str) -> bool:
    return any(part in name for part in _INSERTED) or name.endswith((INITIAL_A, INITIAL_B))


def _other(what: str, fix: str) -> ModelError:
    return ModelError(f"the adapter {what}", where="tuning.init_from", fix=fix)
