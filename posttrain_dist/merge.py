"""Adapters into a model, or into one adapter: `posttrain export --merge`, `posttrain combine`.

merge_checkpoint    a checkpoint of an adapter run -> a model folder, streamed
combine_folders     several LoRA adapter folders -> one
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain_dist.config import RunConfig
from posttrain_dist.errors import CheckpointError, ConfigError, ModelError
from posttrain_dist.evaluation.merge_choice import MergeChoice, choose_weights
from posttrain_dist.models.classifier import LM_HEADS, SCORE, is_classifier
from posttrain_dist.tuning.adapters.combine import Combination, WeightedAdapter, combine
from posttrain_dist.tuning.adapters.merged_tensors import (
    MergeInto,
    merged_tensors,
    refuse_unmergeable,
)
from posttrain_dist.tuning.base import Quantize

if TYPE_CHECKING:
    import torch

    from posttrain_dist.export import RunExport

_log = logging.getLogger(__name__)
_MERGE = "--merge"


def merge_checkpoint(
    run_folder: Path,
    out: Path | None = None,
    step: int | None = None,
    dtype: str | None = None,
    notice: Callable[[str], None] = _log.info,
) -> Path:
    """Write a checkpoint of a run that trained an adapter as a model that needs no adapter.

    The base is read and written shard by shard. Of a base that was quantised in training, both
    its original weights and the dequantised ones are measured on held-out rows, and the nearer
    ones to base + adapter take it in.

    Args:
        out: the new folder; None: `export/` of the run.
        step: which checkpoint; None: the newest.
        dtype: of the weights, "bfloat16" or "float32"; None: what the run trained in.
        notice: called with what the user should know of the folder.

    Raises:
        ConfigError: what was trained cannot be merged.
        CheckpointError: as `posttrain_dist.export.export_checkpoint`.
        ModelError: the base model is another one than was trained on.
    """
    import torch

    from posttrain_dist.checkpoint import store
    from posttrain_dist.checkpoint.hf_folder import write_hf_folder
    from posttrain_dist.checkpoint.trained_state import read_kept
    from posttrain_dist.export import open_checkpoint
    from posttrain_dist.models.folder import check_folder, resolve

    export, source, target = open_checkpoint(run_folder, out, step, notice, made="export")
    config = export.config
    refuse_unmergeable(config.tuning, _MERGE)
    _check_base(export)
    base = resolve(config.model.path)
    network = check_folder(base)
    kept = read_kept(source / store.STATE)
    wanted: torch.dtype = getattr(torch, dtype or export.manifest.layout.dtype)
    choice = _choose(config, run_folder / "prepared", kept, wanted, network)
    if choice.text:
        notice(choice.text)
    facts = export.facts
    plain = {k: v for k, v in (facts.network or network).items() if k != "quantization_config"}
    merge = partial(merged_tensors, base, config.tuning, dtype=wanted, into=choice.into)
    return write_hf_folder(
        _with_scalar_head(merge, kept) if is_classifier(plain) else merge(kept),
        base,
        target,
        dtype=wanted,
        facts=replace(facts, network=plain, card=_card(export, base, choice)),
        notice=notice,
    )


def _with_scalar_head(
    merge: Callable[[Mapping[str, torch.Tensor]], Iterator[tuple[str, torch.Tensor]]],
    kept: Mapping[str, torch.Tensor],
) -> Iterator[tuple[str, torch.Tensor]]:
    """A merged reward model: its own head in place of the base's."""
    head = f"{SCORE}.weight"
    for name, tensor in merge({name: tensor for name, tensor in kept.items() if name != head}):
        if name.partition(".")[0] not in (SCORE, *LM_HEADS):
            yield name, tensor
    yield head, kept[head]


def _check_base(export: RunExport) -> None:
    """Refuse a base model that is not there in files, or that has changed since."""
    from posttrain_dist.models import Weights
    from posttrain_dist.tuning.adapters.base_digest import digest_of_model

    model = export.config.model
    if model.weights is Weights.random:
        raise ConfigError(
            "the base model was random (model.weights=random), and no file holds its weights",
            where=_MERGE,
            fix="leave --merge out",
        )
    digest = digest_of_model(model)
    if export.manifest.lineage.get("base_digest", digest) != digest:
        raise ModelError(
            "was changed since the training began, and the adapter is for what was there",
            where=model.path,
            fix="put the base model back as it was, or train again",
        )


def _choose(
    config: RunConfig,
    prepared: Path,
    kept: Mapping[str, torch.Tensor],
    dtype: torch.dtype,
    network: Mapping[str, Any],
) -> MergeChoice:
    """What takes in the adapter: there is a choice where only the training was quantised."""
    from posttrain_dist.models.quantized import holds_nf4

    if holds_nf4(network):
        facts = {"merged into": "the NF4 weights of the base, dequantised"}
        return MergeChoice(MergeInto.original, facts, "")
    quantized = getattr(config.tuning, "quantize", Quantize.none) is Quantize.nf4
    if quantized and config.objective.own_rows:  # what is measured for the choice is a token loss
        facts = {"merged into": "the original weights of the base, which was in NF4 in training"}
        return MergeChoice(MergeInto.original, facts, "")
    if quantized:
        return choose_weights(config, prepared, kept, dtype)
    return MergeChoice(MergeInto.original, {}, "")


def _card(export: RunExport, base: Path, choice: MergeChoice) -> str:
    from posttrain_dist.tuning.adapters.model_card import merged_card

    manifest = export.manifest
    run = str(manifest.lineage.get("id") or export.run_folder)
    return merged_card(
        base,
        method=str(export.config.to_dict()["tuning"]["kind"]),
        channels=manifest.recipe.channels,
        facts={"run": run, "step": f"{manifest.step:,}", **choice.facts},
    )


# ----------------------------------------------------------------------------------- combining


def combine_folders(
    out: Path,
    adapters: Sequence[tuple[Path, float]],
    combination: Combination,
    *,
    density: float | None = None,
    seed: int = 0,
    notice: Callable[[str], None] = _log.info,
) -> Path:
    """Write several LoRA adapters of one base model as one; see `tuning/adapters/combine.py`.

    Tokenizer, chat templates and generation config are those of the first.

    Args:
        out: the new folder.
        adapters: (adapter folder or run, weight).

    Raises:
        ModelError: the adapters cannot be combined, or are of several base models.
        ConfigError: a weight or the density is out of its range.
        CheckpointError: `out` is already there, or cannot be written.
    """
    from posttrain_dist.tuning.adapters.adapter_folder import find_adapter, read_adapter, read_facts
    from posttrain_dist.tuning.adapters.adapter_writer import AdapterFacts, write_adapter
    from posttrain_dist.tuning.adapters.base_digest import base_digest

    if out.exists():
        raise CheckpointError("is already there", where=str(out), fix="name a new folder")
    places = [find_adapter(folder) for folder, _ in adapters]
    members = [
        WeightedAdapter(place, read_adapter(place), weight)
        for place, (_, weight) in zip(places, adapters, strict=True)
    ]
    saved = combine(members, combination, density=density, seed=seed)
    base = _common_base(places)
    every = [read_facts(place) for place in places]
    channels = dict.fromkeys(channel for facts in every for channel in facts.get("channels", ()))
    quantized = [facts.get("tuning", {}).get("quantize", "none") for facts in every]
    if len(set(quantized)) > 1:
        notice("some of the adapters were trained on a base in NF4, and others were not")
    settings = {
        "adapters": {str(each.folder): each.weight for each in members},
        "combination": combination.name,
        "density": density,
        "seed": seed,
        "quantize": quantized[0] if len(set(quantized)) == 1 else "none",  # of the base
    }
    facts = AdapterFacts(
        method=f"lora ({combination.name} of {len(members)})",
        base_digest=str(every[0].get("base_digest") or base_digest(base)),
        tuning=settings,
        channels=list(channels),
    )
    carry = partial(_carry, places[0], notice=notice)
    return write_adapter(out, saved, base, facts, carry=carry)


def _common_base(places: Sequence[Path]) -> Path:
    """The base model of all adapters.

    Raises:
        ModelError: it is not there, or an adapter is of another one.
    """
    from posttrain_dist.generation.adapter_places import base_of
    from posttrain_dist.tuning.adapters.base_check import check_base

    base = base_of(places[0])
    for place in places:
        check_base(place, base)
    return base


def _carry(source: Path, folder: Path, *, notice: Callable[[str], None]) -> None:
    """Copy what is served beside an adapter's tensors into the new folder."""
    from posttrain_dist.checkpoint.carried_files import carry_files

    carry_files(source, folder, templates=True, notice=notice)
    generation = source / "generation_config.json"
    if generation.is_file():
        (folder / generation.name).write_bytes(generation.read_bytes())
