"""A sweep from what was typed: `posttrain train -m …` becomes sweep.json."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from posttrain_dist.errors import ConfigError
from posttrain_launch.compose.command_line import CommandLine
from posttrain_launch.compose.composer import Composer
from posttrain_launch.sweep.folder import Sweep, is_sweep, write_sweep
from posttrain_launch.sweep.kinds import BACKENDS, SEARCHES, search_module


def create(line: CommandLine, composer: Composer) -> Sweep | None:
    """Make the folder of a sweep; None: launcher or sweeper are not ours, and Hydra runs it.

    Raises:
        ConfigError: there is no trial, one comes twice, or the folder cannot be made.
    """
    composed = _composed(composer, line.overrides)
    choices = composed.hydra.runtime.choices
    launcher, sweeper = choices["hydra/launcher"], choices["hydra/sweeper"]
    if launcher not in BACKENDS and sweeper not in SEARCHES:
        return None
    if launcher not in BACKENDS or sweeper not in SEARCHES:
        if launcher == "basic" or sweeper == "basic":
            return None
        ours, where, fix = (
            (launcher, "hydra/sweeper", f"one of {', '.join(SEARCHES)}")
            if launcher in BACKENDS
            else (sweeper, "hydra/launcher", f"one of {', '.join(BACKENDS)}")
        )
        raise ConfigError(
            f"is not of posttrain, and {ours} works with those alone", where=where, fix=f"use {fix}"
        )
    overrides = list(composed.hydra.overrides.task)
    plain = _plain(composed.hydra.sweeper)
    search = search_module(sweeper).plan(plain, overrides)
    _check_pruner(search, composed)
    folder, name = _place(composed)
    metric, direction = _default_metric(composed)
    sweep = Sweep(
        folder=folder,
        name=name,
        command=line.typed,
        created=datetime.now().astimezone().isoformat(timespec="seconds"),
        cwd=str(Path.cwd()),
        config_dir=_absolute(line.flags.config_dir),
        config_path=_absolute(line.flags.config_path),
        config_name=line.flags.config_name,
        shared=shared_texts(overrides),
        force=line.force,
        metric=search.get("metric", metric),
        direction=search.get("direction", direction),
        backend={"kind": launcher, **_plain(composed.hydra.launcher)},
        search=search,
    )
    try:
        write_sweep(sweep)
    except OSError as error:
        raise ConfigError(
            f"the sweep's folder {folder} cannot be made: {error.strerror or error}",
            where="output_root",
            fix="set output_root=<a folder that you may write to>",
        ) from error
    return sweep


def _default_metric(composed: DictConfig) -> tuple[str, str]:
    """What trials are sorted by, and which way: the held-out loss, unless answers are compared.

    The loss of a comparison is another one with each beta, so that only accuracies compare.
    """
    objective = OmegaConf.get_type(composed.objective)
    assert objective is not None, "every slot has a schema"
    if any(column.name == "accuracy" for column in getattr(objective, "columns", ())):
        return f"eval_{objective.__name__.lower()}/accuracy", "maximize"
    return "eval/loss", "minimize"


def _composed(composer: Composer, overrides: list[str]) -> DictConfig:
    """With Hydra's part for many runs."""
    try:
        return composer.hydra.compose_config(
            config_name=composer.config_name,
            overrides=[*overrides, "hydra.mode=MULTIRUN"],
            run_mode=RunMode.MULTIRUN,
            with_log_configuration=False,
        )
    except HydraException as error:
        what = " ".join(str(error).split("\n")[:2])
        raise ConfigError(
            f"Hydra refuses it: {what}",
            where="-m",
            fix=f"hydra/launcher is one of {', '.join(BACKENDS)}, hydra/sweeper one of "
            f"{', '.join(SEARCHES)}; docs/sweeps.md lists what each takes",
        ) from error


def _check_pruner(search: dict[str, Any], composed: DictConfig) -> None:
    """A trial is given up at an evaluation in the middle, so there must be one.

    Raises:
        ConfigError: there is none.
    """
    every, steps = composed.train.eval_every, composed.train.steps
    pruner = search.get("options", {}).get("pruner", "none")
    overrides = OverridesParser.create().parse_overrides(list(composed.hydra.overrides.task))
    varied = {each.key_or_group for each in overrides if each.is_sweep_override()}
    if pruner == "none" or varied & {"train.eval_every", "train.steps"}:
        return
    if every is None or (steps is not None and every >= steps):
        raise ConfigError(
            f"is {pruner}, and no trial is evaluated between its beginning and its end",
            where="hydra.sweeper.pruner",
            fix="set train.eval_every to a part of the steps",
        )


def shared_texts(overrides: list[str]) -> list[str]:
    """The overrides of one value: as typed, and as Hydra writes them into trials."""
    found: dict[str, None] = {}
    parsed = OverridesParser.create().parse_overrides(overrides)
    for text, override in zip(overrides, parsed, strict=True):
        if not override.is_sweep_override():
            written = f"{override.get_key_element()}={override.get_value_element_as_str()}"
            found |= {text: None, written: None}
    return list(found)


def _plain(node: Any) -> dict[str, Any]:
    """The options of a launcher or a sweeper, without the name of its class."""
    found: Any = OmegaConf.to_container(node, resolve=True)
    return {key: value for key, value in found.items() if key != "_target_"}


def _place(composed: DictConfig) -> tuple[Path, str]:
    """The folder to make, which is not there, and the sweep's name."""
    typed = Path(composed.hydra.sweep.dir).expanduser().absolute()
    if is_sweep(typed):
        raise ConfigError(
            f"{typed} is a sweep already",
            where="hydra.sweep.dir",
            fix=f"go on with it: posttrain run {typed}",
        )
    number, folder = 1, typed
    while folder.exists():
        number += 1
        folder = typed.with_name(f"{typed.name}-{number}")
    return folder, f"{composed.name}-{folder.name}"


def _absolute(path: str | None) -> str | None:
    return path if path is None or "://" in path else str(Path(path).absolute())
