"""Paths of a configuration, made independent of the working directory."""

from __future__ import annotations

import os
from dataclasses import replace

from posttrain_dist.config import RunConfig
from posttrain_dist.engine import DeepSpeed
from posttrain_dist.objectives.reference_choice import Referenced
from posttrain_dist.tuning.base import AdapterTuning

RESERVED = ("embedded", "tiny_base")  # names of what comes with the package, not paths
PREFIXES = ("hf:", "shape:")  # of names of the hub's data sets, and of shapes of models


def with_absolute_paths(config: RunConfig) -> RunConfig:
    """A copy whose paths do not depend on the working directory."""
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
    model = replace(config.model, path=_absolute_path(config.model.path))
    tuning = config.tuning
    if isinstance(tuning, AdapterTuning) and tuning.init_from is not None:
        tuning = replace(tuning, init_from=_absolute_path(tuning.init_from))
    objective = config.objective
    if isinstance(objective, Referenced) and objective.reference_model is not None:
        named = _absolute_path(objective.reference_model)
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
    root = _absolute_path(config.output_root)
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
