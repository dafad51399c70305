"""Before a run begins: what is `auto` becomes what fits, and what cannot fit is refused."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from dataclasses import dataclass

from posttrain_dist.config import AdamW, AutoTuning, RunConfig, complete
from posttrain_dist.config.this_machine import trains_here
from posttrain_dist.errors import ConfigError, PosttrainError
from posttrain_dist.planner.fallbacks import choose, is_auto, miss, nearest, reasons, with_choice
from posttrain_dist.planner.job import DataFacts
from posttrain_dist.planner.machine import find_machine
from posttrain_dist.planner.plan import Choice, Plan


@dataclass(frozen=True, slots=True)
class Settled:
    """A run that can begin.

    Attributes:
        config: completed, with nothing that is `auto`.
        choice: None: nothing could be planned, and nobody had to choose.
        lines: for the terminal.
    """

    config: RunConfig
    choice: Choice | None
    lines: tuple[str, ...] = ()


def settle(
    config: RunConfig,
    facts: DataFacts | None = None,
    typed: Collection[str] = (),
    *,
    force: bool = False,
) -> Settled:
    """Plan a run that is about to be started here, or as a job.

    A run whose tuning and engine are named begins unless it cannot fit: by its plan, with all that
    the allocator and CUDA take, where a cluster would be taken for it; here, where an error costs a
    minute, only if not even what it allocates has room.

    Args:
        config: completed.
        facts: of the data; None: not known.
        typed: keys that were typed; see `fallbacks.choose`.
        force: begin what cannot fit.

    Raises:
        ConfigError: it cannot fit, or nothing does.
        PosttrainError: with `auto`, the machine or the model is not known.
    """
    if is_auto(config):
        machine = find_machine(config, plans_only=False)
        choice = choose(config, machine, facts, typed)
        chosen = complete(_rehearsed(with_choice(config, choice.chosen)))
        return Settled(chosen, choice, _auto_lines(config, choice))
    try:
        machine = find_machine(config, plans_only=False)
        choice = choose(config, machine, facts, typed)
    except PosttrainError as error:
        # Nobody asked for a plan, and what is not known to the planner may well train.
        lines = () if trains_here(config.cluster) else (f"not planned: {error.where} {error.what}",)
        return Settled(config, None, lines)
    plan = choice.chosen.plan
    assert plan is not None
    here = trains_here(config.cluster)
    if force or not _is_hopeless(plan, here=here):
        return Settled(config, choice)
    instead = nearest(config, machine, facts)
    fix = f"use {' '.join(instead.plan.overrides)}" if instead and instead.plan else ""
    fix = f"{fix} ({instead.name})" if instead else "use more or larger GPUs"
    raise ConfigError(
        f"{choice.chosen.name} cannot fit: {miss(plan)}",
        where="tuning",
        fix=f"{fix}; posttrain plan --largest data.max_length says how long rows may be; --force "
        "starts it all the same",
    )


def _is_hopeless(plan: Plan, *, here: bool) -> bool:
    """Whether a run cannot fit even if all of a GPU and of a host were its own."""
    device, host = plan.device.total_bytes, plan.host.total_bytes
    if here:
        device, host = plan.device.peak.allocated_bytes, plan.host.peak.allocated_bytes
    return device > plan.capacity_bytes or host > plan.host_capacity_bytes


def _rehearsed(config: RunConfig) -> RunConfig:
    """With the rehearsal that a choice of the planner begins with, unless it was set."""
    if config.train.rehearse is not None:
        return config
    return dataclasses.replace(config, train=dataclasses.replace(config.train, rehearse=True))


def _auto_lines(config: RunConfig, choice: Choice) -> tuple[str, ...]:
    plan, optimizer = choice.chosen.plan, config.optimizer
    assert plan is not None and isinstance(optimizer, AdamW)
    lines = [f"planned: {choice.chosen.name} ({' '.join(plan.overrides)})"]
    lines += [f"  not {reason}" for reason in reasons(choice)]
    chosen = with_choice(config, choice.chosen).optimizer
    if isinstance(config.tuning, AutoTuning) and isinstance(chosen, AdamW):
        if optimizer.lr is not None and chosen.lr != optimizer.lr:
            lines.append(
                f"  optimizer.lr={optimizer.lr:g} was set for {optimizer.lr_for} "
                f"(optimizer.lr_for); this trains at {chosen.lr:g}"
            )
    return tuple(lines)
