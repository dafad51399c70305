"""Adapter folders on disk: where they are, what they stand on, and their tensors."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain_dist.errors import ConfigError, ModelError, reason
from posttrain_dist.files import read_object

if TYPE_CHECKING:
    import torch

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
OURS = "posttrain.json"  # of this library's adapter folders: how they were trained
BASE = "none"  # the name by which the base model is asked for


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter and no model."""
    return (folder / CONFIG).is_file()


def find_adapters(name: str, path: Path) -> dict[str, Path]:
    """The adapter folders behind a path: itself, that of a run, or those of an ensemble.

    Returns:
        {name: folder}, or {name-0: folder, name-1: ...} of an ensemble.

    Raises:
        ModelError: there is none.
    """
    for folder in (path, path / "adapter"):
        if is_adapter(folder):
            return {name: folder.absolute()}
        found: dict[str, Path] = {}
        while is_adapter(one := folder / f"prompt-{len(found)}"):
            found[f"{name}-{len(found)}"] = one.absolute()
        if found:
            return found
    raise ModelError(
        f"holds no adapter (there is no {CONFIG})",
        where=str(path),
        fix="give an adapter folder, or the folder of a run with an adapter: `posttrain export "
        "RUN` writes that of its newest checkpoint",
    )


def check_name(name: str, taken: Collection[str], folder: Path) -> None:
    """Refuse a name that another adapter or the base model has, or that a request cannot give.

    Raises:
        ConfigError: it is one of these.
    """
    if name in (*taken, BASE, "base") or not name.replace("-", "").isidentifier():
        raise ConfigError(
            f"{name!r} is no free name of an adapter",
            where=str(folder),
            fix=f"use letters, digits, - and _; {BASE} is the base model, and NAME-0, NAME-1 ... "
            "are the prompts of an ensemble NAME",
        )


def find_named(adapters: Mapping[str, Path]) -> dict[str, dict[str, Path]]:
    """`find_adapters` of each name.

    Raises:
        ConfigError: a name is none that an adapter can have, or two adapters get one name.
        ModelError: there is none behind a path.
    """
    found: dict[str, dict[str, Path]] = {}
    for name, path in adapters.items():
        found[name] = find_adapters(name, path)
        for one in {name, *found[name]}:
            others = {n for other, each in found.items() if other != name for n in (other, *each)}
            check_name(one, others, path)
    return found


def own_adapters(folder: Path) -> dict[str, Path]:
    """What a folder holds itself: one adapter, an ensemble, or none."""
    if is_adapter(folder) or is_adapter(folder / "prompt-0"):
        return find_adapters("adapter", folder)
    return {}


def base_of(folder: Path) -> Path:
    """The folder of the base model that an adapter folder names.

    Raises:
        ModelError: it names none, or it is not there.
    """
    from posttrain_dist.models.folder import resolve

    name = read_config(folder).get("base_model_name_or_path")
    fix = f"set base_model_name_or_path in {folder / CONFIG} to the base model's folder"
    if not isinstance(name, str) or not name:
        raise ModelError("names no base model", where=str(folder / CONFIG), fix=fix)
    try:
        return resolve(name)
    except ModelError as error:
        what = f"its base model is not there: {name}"
        raise ModelError(what, where=str(folder), fix=f"{fix}, or put it back") from error


def stood_on_nf4(folder: Path) -> bool:
    """Whether an adapter was trained by this library beside weights in NF4."""
    try:
        tuning = read_object(folder / OURS).get("tuning", {})
    except (OSError, ValueError):
        return False
    return isinstance(tuning, dict) and tuning.get("quantize") == "nf4"


def nf4_notice(folders: Mapping[str, Path], base: Path, nf4: bool) -> str:
    """What to know where adapters stand on a base unlike that of their training; "" if none does.

    Args:
        folders: by name.
        base: of the model.
        nf4: whether its weights are quantised when they are loaded.
    """
    if read_object(base / "config.json").get("quantization_config"):  # then always
        return ""
    other = [name for name, folder in folders.items() if stood_on_nf4(folder) != nf4]
    if not other:
        return ""
    here, there = ("NF4", "unquantised weights") if nf4 else ("unquantised weights", "NF4")
    return (
        f"{', '.join(other)}: trained beside {there}, and here on {here}, as one base is loaded "
        "for all; alone it stands on what it was trained beside"
    )


def read_config(folder: Path) -> dict[str, Any]:
    """adapter_config.json of a folder.

    Raises:
        ModelError: it cannot be read.
    """
    try:
        found = read_object(folder / CONFIG)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"cannot be read: {reason(error)}", where=str(folder / CONFIG), fix="get it again"
        ) from error
    return found


def tensors_of(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and tensors of an adapter's file, one after the other."""
    from safetensors import safe_open

    with safe_open(folder / WEIGHTS, "pt") as file:
        for name in file.keys():  # noqa: SIM118  it is no mapping
            yield name, file.get_tensor(name)


def shapes_of(folder: Path) -> dict[str, list[int]]:
    """Of the tensors of an adapter's file, which are not read."""
    from safetensors import safe_open

    with safe_open(folder / WEIGHTS, "pt") as file:
        return {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118


def refuse_nonfinite(tensors: Iterable[tuple[str, torch.Tensor]], folder: Path) -> None:
    """See that tensors hold numbers.

    Raises:
        ModelError: one holds NaN or infinity.
    """
    for name, tensor in tensors:
        if not tensor.isfinite().all():
            raise ModelError(
                f"{name} holds NaN or infinity",
                where=str(folder),
                fix="use the adapter of an earlier checkpoint: the training that wrote this one "
                "has diverged, or the file was damaged",
            )
