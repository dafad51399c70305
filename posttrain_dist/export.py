"""A checkpoint -> a Hugging Face folder, streamed tensor by tensor, without a GPU or a cluster."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain_dist.checkpoint import store
from posttrain_dist.checkpoint.manifest import WITH_NETWORK, Manifest, fault_of, read_manifest
from posttrain_dist.config import RunConfig
from posttrain_dist.errors import CheckpointError

if TYPE_CHECKING:
    from posttrain_dist.data.chat.rendering.served import Served

_log = logging.getLogger(__name__)


def export_checkpoint(
    run_folder: Path,
    out: Path | None = None,
    step: int | None = None,
    dtype: str | None = None,
    notice: Callable[[str], None] = _log.info,
) -> Path:
    """Write a checkpoint of a run as a model folder that plain transformers loads.

    Args:
        out: the new folder; None: `export/` of the run.
        step: which checkpoint; None: the newest.
        dtype: of the weights, "bfloat16" or "float32"; None: what the run trained in.
        notice: called with what the user should know of the folder.

    Raises:
        CheckpointError: there is no whole checkpoint, a file of it is damaged, or `out` is already
            there; a training row's prompt comes out otherwise than it was trained.
        DataError: the prepared data of the run is damaged.
    """
    import torch

    from posttrain_dist.checkpoint.hf_folder import RunFacts, write_hf_folder
    from posttrain_dist.engine.state_files import step_of_file
    from posttrain_dist.models.folder import resolve

    if not (run_folder / "config.yaml").is_file():
        raise CheckpointError(
            "is no run folder: it has no config.yaml",
            where=str(run_folder),
            fix="give a folder such as outputs/<name>/<time>",
        )
    config = RunConfig.from_yaml((run_folder / "config.yaml").read_text(encoding="utf-8"))
    source = _choose(run_folder, step)
    target = out or run_folder / "export"
    if out is not None and target.exists():
        raise CheckpointError("is already there", where=str(target), fix="name a new folder")
    manifest = read_manifest(source)
    if damage := store.damage_of(source, step_of_file):
        raise CheckpointError(damage, where=str(source), fix=_older(run_folder, source))
    if manifest.layout.engine == "single":
        from posttrain_dist.engine.single import read_full_tensors
    else:
        from posttrain_dist.engine.deepspeed import read_full_tensors
    tensors = read_full_tensors(source / store.STATE)
    return write_hf_folder(
        tensors,
        resolve(config.model.path),
        target,
        dtype=getattr(torch, dtype or manifest.layout.dtype),
        facts=RunFacts(
            manifest.recipe.model,
            _end_token_ids(manifest.lineage),
            _served(run_folder, manifest),
            config.model.add_tokens,
        ),
        notice=notice,
    )


def _served(run_folder: Path, manifest: Manifest) -> Served | None:
    """The chat templates of a run; null for one that used none, or of an earlier version.

    Raises:
        CheckpointError: they are gone with the prepared data.
    """
    from posttrain_dist.data.chat.rendering.served import SERVED, WITH_SERVED, Served
    from posttrain_dist.data.prepared.summary import Summary

    prepared = run_folder / "prepared"
    served = Served.read(prepared)
    used_one = manifest.format >= WITH_NETWORK and manifest.lineage.get("template_sha256")
    if served is None and used_one:
        has_data = (prepared / "summary.json").is_file()
        if has_data and Summary.read(prepared).inputs.get("format", 0) < WITH_SERVED:
            return None
        raise CheckpointError(
            "is gone, and it has the chat template that the model was trained with",
            where=str(prepared / SERVED),
            fix=f"put it back; or remove FINISHED, and `posttrain run {run_folder}` prepares the "
            "data again and writes the export",
        )
    return served


def _end_token_ids(lineage: dict[str, Any]) -> list[int]:
    """Those of a checkpoint; earlier ones name one token at most."""
    one = lineage.get("end_token_id")
    return list(lineage.get("end_token_ids", [] if one is None else [one]))


def _choose(run_folder: Path, step: int | None) -> Path:
    there = store.checkpoints(run_folder)
    whole = store.whole_checkpoints(run_folder)
    if step is None and whole:
        if there[-1] != whole[-1]:
            raise CheckpointError(
                f"is the newest checkpoint and damaged: {fault_of(there[-1])}",
                where=str(there[-1]),
                fix=_older(run_folder, there[-1]),
            )
        return whole[-1]
    named = store.folder_of(run_folder, step or 0)
    if named in whole:
        return named
    steps = ", ".join(str(read_manifest(path).step) for path in whole)
    damaged = "; ".join(f"{path.name}: {fault_of(path)}" for path in there if path not in whole)
    raise CheckpointError(
        f"has no whole checkpoint{f' of step {step}' if step is not None else ''}"
        + (f"; there are steps {steps}" if steps else "")
        + (f" ({damaged})" if damaged else ""),
        where=str(run_folder / "checkpoints"),
        fix="name one of these" if steps else _start_again(run_folder, there),
    )


def _older(run_folder: Path, damaged: Path) -> str:
    """What to do about a checkpoint that is damaged: never done unasked."""
    from posttrain_dist.engine.state_files import step_of_file

    there = store.checkpoints(run_folder)
    for older in reversed(there[: there.index(damaged)]):
        if not store.damage_of(older, step_of_file):
            return f"export an older one: --step {int(older.name.removeprefix('step-'))}"
    return f"there is no whole one before it: {_start_again(run_folder, there)}"


def _start_again(run_folder: Path, there: list[Path]) -> str:
    if not there:
        return "train first (train.save_every=N saves on the way)"
    again = f"`posttrain run {run_folder} train.resume=never` starts again and keeps them aside"
    return f"copy one again; or {again}"
