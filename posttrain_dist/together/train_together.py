"""Trainings of several LoRA runs in one process, step by step in turn, over one frozen base.

Each has the losses of its run alone to 1e-6 and its weights to 1e-5 in float32 (products of longer
rows are summed in another order), and all its files: checkpoints, metrics.jsonl, the adapter.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from posttrain_dist import dist
from posttrain_dist.build import build_policy, on_nf4, parameter_rules
from posttrain_dist.config import RunConfig
from posttrain_dist.dist import Process
from posttrain_dist.engine.base import TrainEngine
from posttrain_dist.errors import ConfigError
from posttrain_dist.flow import StepInfo
from posttrain_dist.models.folder import resolve
from posttrain_dist.models.load import load_base
from posttrain_dist.models.policy import Policy
from posttrain_dist.together.compatible import check_together
from posttrain_dist.together.shared_base import SharedBase
from posttrain_dist.together.shared_forward import Group, MemberEngine
from posttrain_dist.train import training


def train_together(runs: Sequence[tuple[RunConfig, Path]]) -> list[Exception | None]:
    """Train several runs in this process; each goes on from its newest checkpoint, as `train` does.

    `posttrain_dist.prepare.prepare(config, folder / "prepared")` comes first for each.

    Args:
        runs: config and run folder; they differ in their adapters and optimizers alone.

    Returns:
        For each run what ended it; None: its training came to its end, or was stopped. A run
        that fails leaves the others alone.

    Raises:
        ConfigError: they cannot be trained together.
    """
    check_together([config for config, _ in runs])
    shared = _Shared()
    ended: list[Exception | None] = [None] * len(runs)
    live: dict[int, Iterator[StepInfo]] = {
        i: training(config, folder, Process(), build=shared.builder(i))
        for i, (config, folder) in enumerate(runs)
    }
    # The first step of each by itself: building, checks, the evaluation before training.
    while live:
        for i, steps in list(live.items()):
            try:
                next(steps)
                continue
            except StopIteration:
                pass
            except Exception as error:
                ended[i] = error
            del live[i]
            shared.leave(i)
        shared.group.shares = True
    return ended


@dataclass(slots=True)
class _Shared:
    """What the runs have in common, made by the first of them."""

    group: Group = field(default_factory=Group)
    base: SharedBase | None = None
    dtype: torch.dtype | None = None
    engines: dict[int, MemberEngine] = field(default_factory=dict)

    def builder(self, run: int) -> Any:
        """What `training` builds engine and policy of a run by."""

        def build(
            config: RunConfig, process: Process, dtype: torch.dtype, channels: list[str]
        ) -> tuple[TrainEngine, Policy]:
            rules, optimizer = parameter_rules(config), config.optimizer
            engine = MemberEngine(optimizer, dist.device(process), rules, self.group)  # type: ignore[arg-type]
            self.engines[run] = engine
            tree = self._base(config, engine, dtype).tree()
            return engine, build_policy(config, engine, dtype, channels, base=tree)

        return build

    def leave(self, run: int) -> None:
        """Let go of what only this run needs."""
        engine = self.engines.pop(run, None)
        if engine is not None:
            self.group.leave(engine)

    def _base(self, config: RunConfig, engine: MemberEngine, dtype: torch.dtype) -> SharedBase:
        if self.base is None:
            folder = resolve(config.model.path)
            self.dtype = dtype
            self.base = SharedBase(
                lambda: load_base(
                    config.model,
                    folder,
                    dtype=dtype,
                    seed=config.seed,
                    nf4=on_nf4(config, folder),
                    device=engine.device,
                )
            )
        if dtype is not self.dtype:
            raise ConfigError(
                f"auto chose {dtype} for this run and {self.dtype} for the others",
                where="train.dtype",
                fix="set train.dtype to one of them",
            )
        return self.base
