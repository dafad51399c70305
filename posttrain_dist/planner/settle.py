"""Before a run begins: what is `auto` becomes what fits, and what cannot fit is refused."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Collection
from dataclasses import dataclass

from posttrain_dist.config import AdamW, AutoTuning, RunConfig, complete
from posttrain_dist.config.this_machine import trains_here
from posttrain_dist.errors import ConfigError, PosttrainError
from posttrain_dist.planner.fallbacks import choose, is_auto, miss, nearest, reasons, with_choice
from posttrain_dist.planner.job import DataFacts
from posttrain_dist.planner.machine import find_machine
from posttrain_dist.planner.plan import Choice, Memory, PhaseName, Plan

_OF_STATE = (PhaseName.update, PhaseName.save)
_log = logging.getLogger(__name__)


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
    minute, only if weights and optimizer state alone have no room.

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
        choice = choose(config, machine, facts, typed, force=force)
        chosen = complete(rehearsed(with_choice(config, choice.chosen)))
        return Settled(chosen, choice, _auto_lines(config, choice))
    here = trains_here(config.cluster)
    try:
        machine = find_machine(config, plans_only=False)
        choice = choose(config, machine, facts, typed)
    except PosttrainError as error:
        # Nobody asked for a plan, and what the planner does not know may well train.
        return Settled(config, None, () if here else (f"not planned: {error.where} {error.what}",))
    except Exception as error:
        _log.exception("the run goes on without a plan")
        return Settled(config, None, (f"not planned: {type(error).__name__}: {error}",))
    plan = choice.chosen.plan
    assert plan is not None
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
        device, host = _state_bytes(plan.device), _state_bytes(plan.host)
    return device > plan.capacity_bytes or host > plan.host_capacity_bytes


def _state_bytes(memory: Memory) -> int:
    """What is allocated whatever the data: rows may be shorter than they may be."""
    kept = [phase for phase in memory.phases if phase.name in _OF_STATE]
    return max((phase.allocated_bytes for phase in kept), default=0)


def rehearsed(config: RunConfig) -> RunConfig:
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
    assert isinstance(chosen, AdamW)
    if isinstance(config.tuning, AutoTuning) and optimizer.lr not in (None, chosen.lr):
        lines.append(
            f"  optimizer.lr={optimizer.lr:g} was set for {optimizer.lr_for} (optimizer.lr_for); "
            f"this trains at {chosen.lr:g}"
        )
    return tuple(lines)
