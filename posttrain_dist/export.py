"""A checkpoint -> a Hugging Face folder or an adapter folder, without a GPU or a cluster.

A model is streamed tensor by tensor; of a tuning that trains something beside the model, that alone
is written, as `peft` has it.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain_dist import dist
from posttrain_dist.checkpoint import store
from posttrain_dist.checkpoint.manifest import WITH_NETWORK, Manifest, fault_of, read_manifest
from posttrain_dist.config import RunConfig
from posttrain_dist.errors import CheckpointError, ConfigError
from posttrain_dist.files import read_object

if TYPE_CHECKING:
    import torch

    from posttrain_dist.checkpoint.hf_folder import RunFacts
    from posttrain_dist.data.chat.rendering.served import Served
    from posttrain_dist.flow import StepInfo

    NamedTensors = Iterable[tuple[str, torch.Tensor]]
    FullTensors = Callable[[Callable[[str], bool]], NamedTensors]

_log = logging.getLogger(__name__)


def export_checkpoint(
    run_folder: Path,
    out: Path | None = None,
    step: int | None = None,
    dtype: str | None = None,
    notice: Callable[[str], None] = _log.info,
    *,
    plain: bool = False,
) -> Path:
    """Write a checkpoint of a run as a folder that plain transformers, or `peft`, loads.

    Args:
        out: the new folder; None: `export/` of the run, `adapter/` of one that trained an adapter.
        step: which checkpoint; None: the newest.
        dtype: of the weights, "bfloat16" or "float32"; None: what the run trained in.
        notice: called with what the user should know of the folder.
        plain: LoRA's variants as plain LoRA of alpha / rank on the base as it is, exactly.

    Raises:
        CheckpointError: there is no whole checkpoint, a file of it is damaged, or `out` is already
            there; a training row's prompt comes out otherwise than it was trained.
        ConfigError, ModelError: `plain` of what is no LoRA.
        DataError: the prepared data of the run is damaged.
    """
    export, source, target = open_checkpoint(run_folder, out, step, notice)
    config, manifest = export.config, export.manifest
    if not config.tuning.whole_model:
        from posttrain_dist.checkpoint.trained_state import read_kept

        kept = read_kept(source / store.STATE).items()
        return export.write_adapter(kept, target, manifest.step, dtype=dtype, plain=plain)
    if plain:
        raise ConfigError(
            "this run trained the model itself, which is plain as it is",
            where="--plain",
            fix="leave it out",
        )
    if manifest.layout.engine == "single":
        from posttrain_dist.engine.single import read_full_tensors
    else:
        from posttrain_dist.engine.deepspeed import read_full_tensors
    return export.write_model(read_full_tensors(source / store.STATE), target, dtype=dtype)


def open_checkpoint(
    run_folder: Path,
    out: Path | None,
    step: int | None,
    notice: Callable[[str], None],
    made: str | None = None,
) -> tuple[RunExport, Path, Path]:
    """What writes a checkpoint, the folder of that checkpoint, and the new folder.

    Args:
        made: where the run has what is made, if `out` is None; None: as `made_folder` says.

    Raises:
        CheckpointError: as `export_checkpoint`.
        DataError: the prepared data of the run is damaged.
    """
    from posttrain_dist.engine.state_files import step_of_file

    if not (run_folder / "config.yaml").is_file():
        raise CheckpointError(
            "is no run folder: it has no config.yaml",
            where=str(run_folder),
            fix="give a folder such as outputs/<name>/<time>",
        )
    config = RunConfig.from_yaml((run_folder / "config.yaml").read_text(encoding="utf-8"))
    source = _choose(run_folder, step)
    target = out or run_folder / (made or made_folder(config))
    if out is not None and target.exists():
        raise CheckpointError("is already there", where=str(target), fix="name a new folder")
    manifest = read_manifest(source)
    if damage := store.damage_of(source, step_of_file):
        raise CheckpointError(damage, where=str(source), fix=_older(run_folder, source))
    served = _served(run_folder, manifest)
    return RunExport(config, run_folder, manifest, served, notice), source, target


def made_folder(config: RunConfig) -> str:
    """What a run makes in its folder: `export`, a model, or `adapter`, to be put on its base."""
    return "export" if config.tuning.whole_model else "adapter"


# ------------------------------------------------------------------------------------- writing


@dataclass(frozen=True, slots=True)
class RunExport:
    """Writes what a run made: a model, or what was trained beside its base model.

    Args:
        manifest: of the run or of a checkpoint.
        served: the chat templates, and rows that check them; None: those of the model folder.
        notice: called with what the user should know of the folder.
    """

    config: RunConfig
    run_folder: Path
    manifest: Manifest
    served: Served | None
    notice: Callable[[str], None] = _log.info

    @property
    def facts(self) -> RunFacts:
        """What the run knows of the model that it makes, beside the weights."""
        from posttrain_dist.checkpoint.hf_folder import RunFacts

        manifest = self.manifest
        ends = _end_token_ids(manifest.lineage)
        added = self.config.model.add_tokens
        return RunFacts(manifest.recipe.model, ends, self.served, added_tokens=added)

    def write(self, full_tensors: FullTensors, step: int) -> Path:
        """Write `export/` or `adapter/` of the run; collective.

        Args:
            full_tensors: of the engine.
        """
        target = self.run_folder / made_folder(self.config)
        if self.config.tuning.whole_model:
            return self.write_model(full_tensors(_every), target)
        return self.write_adapter(full_tensors(self.config.tuning.kept), target, step)

    def write_model(self, tensors: NamedTensors, target: Path, *, dtype: str | None = None) -> Path:
        """Write a model folder; collective, see `write_hf_folder`."""
        import torch

        from posttrain_dist.checkpoint.hf_folder import write_hf_folder
        from posttrain_dist.models.folder import resolve

        return write_hf_folder(
            tensors,
            resolve(self.config.model.path),
            target,
            dtype=getattr(torch, dtype or self.manifest.layout.dtype),
            facts=self.facts,
            notice=self.notice,
        )

    def write_adapter(
        self,
        kept: NamedTensors,
        target: Path,
        step: int,
        *,
        dtype: str | None = None,
        plain: bool = False,
    ) -> Path:
        """Write an adapter folder; collective: every rank runs through `kept`, rank 0 writes.

        Args:
            kept: every tensor that the tuning keeps, whole, each valid until the next.
            dtype: of the tensors; None: what the run trained in.
            plain: see `export_checkpoint`.

        Raises:
            CheckpointError: nothing was trained, a number is not finite, or the disk refused.
            ModelError: `plain` of what is no LoRA.
        """
        import torch

        wanted: torch.dtype = getattr(torch, dtype or self.manifest.layout.dtype)
        tensors: dict[str, torch.Tensor] = {}
        for name, tensor in kept:
            if dist.rank() == 0:
                own = wanted if tensor.is_floating_point() else tensor.dtype
                tensors[name] = tensor.detach().to("cpu", own, copy=True)
        in_order = dict(sorted(tensors.items()))  # as a checkpoint gives them
        dist.on_main(lambda: self._write_adapter(in_order, target, step, plain))
        return target

    def _write_adapter(
        self, tensors: dict[str, torch.Tensor], target: Path, step: int, plain: bool
    ) -> None:
        from posttrain_dist.models.folder import check_folder, resolve
        from posttrain_dist.tuning.adapters.adapter_writer import AdapterFacts, write_adapter
        from posttrain_dist.tuning.adapters.base_digest import digest_of_model
        from posttrain_dist.tuning.injection.low_rank import as_plain_lora

        model, values = self.config.model, self.config.to_dict()["tuning"]
        base = resolve(model.path)
        own = check_folder(base, need_weights=False)
        network = {**own, **self.facts.network}
        saved = self.config.tuning.to_adapter(tensors, network)
        if plain:
            saved = as_plain_lora(saved)
        digest = digest_of_model(model)
        if self.manifest.lineage.get("base_digest", digest) != digest:
            self.notice(
                f"{base} was changed since the training began: the adapter is for the model that "
                "was there, and answers otherwise on this one"
            )
        facts = AdapterFacts(
            method=values.pop("kind"),
            base_digest=self.manifest.lineage.get("base_digest", digest),
            tuning=values,
            channels=self.manifest.recipe.channels,
            run=read_object(self.run_folder / "run.json").get("id", self.run_folder.name),
            step=step,
            versions=_versions(),
            vocab_size=_unless_same(network.get("vocab_size"), own.get("vocab_size")),
        )
        carry = partial(self._carry, base, target)
        write_adapter(target, saved, base, facts, carry=carry)

    def _carry(self, base: Path, target: Path, folder: Path) -> None:
        from posttrain_dist.checkpoint.hf_folder import write_served_files

        write_served_files(base, folder, self.facts, target, self.notice)


def _unless_same(value: int | None, other: int | None) -> int | None:
    return None if value == other else value


def _every(name: str) -> bool:
    return True


class RehearseExport:
    """The adapter of the first step, written, reopened and thrown away.

    What would fail at the end of the training fails before the second step: names that do not fit,
    tensors that come out of a sharded model empty, a template that renders another text, no room.
    """

    def __init__(self, export: RunExport, full_tensors: FullTensors) -> None:
        self._export, self._full_tensors = export, full_tensors
        config = export.config
        self._done = config.tuning.whole_model or not config.checkpoint.export

    def __call__(self, info: StepInfo) -> None:
        """Rehearse once; collective.

        Raises:
            CheckpointError: what `RunExport.write_adapter` raises.
        """
        if self._done or info.step == 0 or info.nonfinite_step:
            return
        self._done = True
        export = replace(self._export, notice=_log.info)  # the user is told at the end
        target = export.run_folder / ".rehearsal"
        export.write_adapter(self._full_tensors(export.config.tuning.kept), target, info.step)
        dist.on_main(lambda: shutil.rmtree(target, ignore_errors=True))


def _versions() -> dict[str, str]:
    """Of the packages that an adapter's reader may have to know."""
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in ("posttrain-dist", "torch", "transformers", "peft"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


# ---------------------------------------------------------------------------------- the run


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
