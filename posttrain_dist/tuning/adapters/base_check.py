"""Whether an adapter is of a base model: by digest, or by sizes where plain `peft` wrote it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain_dist.errors import ConfigError, ModelError, reason
from posttrain_dist.files import read_object
from posttrain_dist.models.folder import check_folder, load_tokenizer
from posttrain_dist.tuning.adapters.adapter_folder import (
    adapter_parts,
    find_adapter,
    read_adapter,
    read_facts,
)
from posttrain_dist.tuning.adapters.base_digest import RANDOM, BaseTensor, base_digest, base_tensors

if TYPE_CHECKING:
    from posttrain_dist.tuning.saved_adapter import SavedAdapter

# A tensor of LoRA or IA3: the module that it stands beside, and what it is there.
_BESIDE = re.compile(
    r"base_model\.model\.(.+?)\.(lora_A|lora_B|lora_embedding_A|lora_embedding_B|ia3_l)\b.*"
)
_PACKED = ("U8", "I8", "I32")  # of quantised weights, whose shapes tell nothing


def check_base(folder: Path, base: Path) -> str:
    """Refuse an adapter of another base model.

    Args:
        folder: of the adapter, or a run; it is read, so that a damaged one is refused too.
        base: of the model that it is to stand on.

    Returns:
        What the user should know: that only sizes could be compared; "" if digests were.

    Raises:
        ModelError: the adapter cannot be used, or is of another base.
    """
    place, saved, facts = find_adapter(folder), read_adapter(folder), read_facts(folder)
    digest = facts.get("base_digest")
    if not digest:
        _compare_sizes(saved, base, place)
        return not_compared(folder, base)
    if str(digest).startswith(RANDOM):
        raise ModelError(
            "was trained on random weights (model.weights=random), which no folder holds",
            where=str(place),
            fix="train it again on a model with weights",
        )
    found = base_digest(base)
    if found != digest:
        raise ModelError(
            f"is an adapter of {facts.get('base')} (digest {digest}), and {base} is another model "
            f"(digest {found})",
            where=str(place),
            fix="set model.path to the base model that it was trained on",
        )
    return ""


def not_compared(folder: Path, base: Path) -> str:
    """What the user should know of an adapter that has no digest of its base; "" if it has one."""
    place = find_adapter(folder)
    if read_facts(folder).get("base_digest"):
        return ""
    named = read_adapter(folder).config.get("base_model_name_or_path")
    other = bool(named) and Path(str(named)).expanduser().resolve() != base.resolve()
    return (
        f"{place} does not say by a digest which base model it is of: modules and sizes fit "
        f"{base}, its weights were not compared"
        + (f"; and its own base model is called {named}" if other else "")
    )


def check_tokens(folder: Path, base: Path, add_tokens: Sequence[str]) -> None:
    """Refuse an adapter whose own tokenizer has other new tokens, or has them in another order.

    Rows are taken by id, so nothing else would tell.

    Args:
        folder: of the adapter, or a run.
        base: of the model that it is to stand on.
        add_tokens: `model.add_tokens`.

    Raises:
        ConfigError: they differ.
        ModelError: the tokenizer beside the adapter cannot be read, or it trains rows of tokens
            that the base has.
    """
    _refuse_old_tokens(folder, base)
    file = adapter_parts(folder)[0] / "tokenizer.json"
    if not file.is_file():
        return
    try:
        added = sorted((t["id"], t["content"]) for t in read_object(file).get("added_tokens", ()))
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ModelError(
            f"is no tokenizer: {reason(error)}", where=str(file), fix="copy the folder again"
        ) from error
    of_base = load_tokenizer(base).backend_tokenizer
    own = [(i, token) for i, token in added if of_base.token_to_id(token) is None]
    of_rows = load_tokenizer(base, None, add_tokens).backend_tokenizer
    if any(of_rows.token_to_id(token) != i for i, token in own):
        tokens = json.dumps([token for _, token in own], ensure_ascii=False)
        raise ConfigError(
            f"is {list(add_tokens) or 'not set'}, and {folder} was trained with {tokens}",
            where="model.add_tokens",
            fix=f"set 'model.add_tokens={tokens}'",
        )


def _refuse_old_tokens(folder: Path, base: Path) -> None:
    trained = read_adapter(folder).config.get("trainable_token_indices") or []
    lists = trained.values() if isinstance(trained, Mapping) else [trained]
    of_base = load_tokenizer(base).backend_tokenizer
    known = sorted({i for ids in lists for i in ids if of_base.id_to_token(i) is not None})
    if known:
        raise ModelError(
            f"trains the rows of {len(known)} tokens that the base model has, such as "
            f"{of_base.id_to_token(known[0])!r}, which no tuning of this library does",
            where=str(folder),
            fix="`posttrain chat BASE --adapter NAME=FOLDER` takes it through peft; for the rest "
            "merge it with peft (merge_and_unload)",
        )


def _compare_sizes(saved: SavedAdapter, base: Path, place: Path) -> None:
    """Compare target modules, or the width of virtual tokens, with the tensors of a base.

    Raises:
        ModelError: the base has no such module, or one of another size.
    """
    network, tensors = check_folder(base), base_tensors(base)
    modules = _by_suffix(tensors)
    missing, differing = [], []
    for name, tensor in saved.tensors.items():
        found = _BESIDE.fullmatch(name)
        if found is None:
            continue
        module, part = found.groups()
        weight = next((modules[end] for end in _ends(module) if end in modules), None)
        if weight is None:
            missing.append(module)
        elif weight.dtype not in _PACKED and not _fits(part, tuple(tensor.shape), weight.shape):
            differing.append(f"{name} {tuple(tensor.shape)} beside a weight {weight.shape}")
    width, own = saved.config.get("token_dim"), network.get("hidden_size")
    embeds = saved.config.get("peft_type") != "PREFIX_TUNING"  # whose width is that of keys
    if "prompt_embeddings" in saved.tensors and embeds and width and own and width != own:
        differing.append(f"virtual tokens of width {width} in a model of width {own}")
    if missing or differing:
        what = differing[0] if differing else f"there is no module {missing[0]}"
        raise ModelError(
            f"is no adapter of {base}: {what}",
            where=str(place),
            fix="set model.path to its base model"
            + (f", {named}" if (named := saved.config.get("base_model_name_or_path")) else ""),
        )


def _by_suffix(tensors: Mapping[str, BaseTensor]) -> dict[str, BaseTensor]:
    """Weights by the names of their modules, whole and without the first one or two parts.

    Some files leave out the name of the backbone, others have one more than the model.
    """
    found: dict[str, Any] = {}
    for name, tensor in tensors.items():
        if name.endswith(".weight"):
            for end in _ends(name.removesuffix(".weight")):
                found.setdefault(end, tensor)
    return found


def _ends(module: str) -> list[str]:
    parts = module.split(".")
    return [".".join(parts[i:]) for i in range(min(3, len(parts)))]


def _fits(part: str, shape: tuple[int, ...], weight: tuple[int, ...]) -> bool:
    """Whether one of its sides is one of the weight's; the other is the rank, or 1."""
    sides = {"lora_A": shape[1:], "lora_B": shape[:1]}
    sides |= {"lora_embedding_A": shape[1:], "lora_embedding_B": shape[:1]}
    return all(side in weight for side in sides.get(part, (max(shape),)))
