"""Paths of a configuration, made independent of the working directory."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from posttrain_dist.config import RunConfig
from posttrain_dist.engine import DeepSpeed
from posttrain_dist.errors import ModelError
from posttrain_dist.objectives.reference_choice import Referenced
from posttrain_dist.tuning.base import AdapterTuning

RESERVED = ("embedded", "tiny_base")  # names of what comes with the package, not paths
PREFIXES = ("hf:", "shape:")  # of names of the hub's data sets, and of shapes of models
RUN = "run:"  # before the name of a run: what its newest finished one made


def with_absolute_paths(config: RunConfig) -> RunConfig:
    """A copy whose paths do not depend on the working directory.

    Raises:
        ModelError: a run that a path names made nothing that could be used.
    """
    root = _absolute_path(config.output_root)
    data = replace(
        config.data,
        train=_absolute_path(config.data.train),
        eval=None if config.data.eval is None else _absolute_path(config.data.eval),
        sources={
            name: replace(source, path=_absolute_path(source.path))
            for name, source in config.data.sources.items()
        },
        cache=None if config.data.cache is None else _absolute_path(config.data.cache),
    )
    template = config.template
    if template.name.endswith(".jinja"):
        template = replace(template, name=_absolute_path(template.name))
    model = replace(config.model, path=_made_by_run(config.model.path, root, "model.path"))
    tuning = config.tuning
    if isinstance(tuning, AdapterTuning) and tuning.init_from is not None:
        made = _made_by_run(tuning.init_from, root, "tuning.init_from")
        tuning = replace(tuning, init_from=made)
    objective = config.objective
    if isinstance(objective, Referenced) and objective.reference_model is not None:
        named = _made_by_run(objective.reference_model, root, "objective.reference_model")
        objective = replace(objective, reference_model=named)
    engine = config.engine
    if isinstance(engine, DeepSpeed) and engine.config is not None:
        engine = replace(engine, config=_absolute_path(engine.config))
    train = config.train
    if train.resume == "never":
        # The folder is new; from here on, what is resumed is this run itself, after a restart.
        train = replace(train, resume="auto")
    if train.resume != "auto":
        train = replace(train, resume=_absolute_path(train.resume))
    return replace(
        config,
        data=data,
        template=template,
        model=model,
        objective=objective,
        tuning=tuning,
        engine=engine,
        train=train,
        output_root=root,
    )


def _absolute_path(path: str) -> str:
    if path in RESERVED or not path or path.startswith(PREFIXES):
        return path
    return os.path.abspath(os.path.expanduser(path))  # noqa: PTH100, PTH111 - keeps globs


# What a key takes of a run -> the folder of it, as `posttrain export` would write it.
_PARTS = {
    "model.path": "export",
    "objective.reference_model": "export",
    "tuning.init_from": "adapter",
}


def _made_by_run(path: str, output_root: str, key: str) -> str:
    """`run:NAME` as the model, or the adapter, of the newest finished run of that name.

    Raises:
        ModelError: there is none, or it made the other of the two.
    """
    if not path.startswith(RUN):
        return _absolute_path(path)
    name, part = path.removeprefix(RUN), _PARTS[key]
    runs = sorted(Path(output_root, name).glob("*/")) if name else []
    finished = [run for run in runs if (run / "FINISHED").is_file()]
    made = [run for run in finished if (run / part).is_dir()]
    if made:
        return str(made[-1] / part)
    what = f"there is no run {name!r} in {output_root}"
    fix = f"train it first, with name={name or 'NAME'}, or write the path of a folder"
    if finished:
        what = f"no finished run in {finished[-1].parent} has a folder {part}/"
        fix = f"write one: posttrain export {finished[-1]} OUT, then {key}=OUT"
        if key == "model.path" and (finished[-1] / "adapter").is_dir():
            what += ": the newest trained an adapter"
            fix = (
                f"make one model of base and adapter: posttrain export {finished[-1]} OUT --merge, "
                f"then {key}=OUT; or go on with the adapter: tuning.init_from={path}"
            )
    elif runs:
        what = f"no run in {runs[-1].parent} is finished"
        fix = f"finish the newest: posttrain run {runs[-1]}"
    raise ModelError(what, where=f"{key}={path}", fix=fix)
