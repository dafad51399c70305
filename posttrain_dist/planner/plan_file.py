"""plan.json of a run folder: what was planned before the run began, for reports and restarts.

{"choice": {"tried": [{"name", "plan", "leanest", "refused"}, ...], "chosen": name},
 "plan": the chosen one, as Plan.to_json has it}
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from posttrain_dist.files import read_object, write_atomic
from posttrain_dist.planner.fallbacks import reasons
from posttrain_dist.planner.plan import Choice, Item, Memory, Phase, PhaseName, Plan, Speed, Tried

NAME = "plan.json"


def write_plan(folder: Path, choice: Choice) -> None:
    """Write plan.json of a run folder, whole or not at all."""
    write_atomic(folder / NAME, json.dumps(file_content(choice), indent=1) + "\n", to_disk=True)


def read_plan(folder: Path) -> dict[str, Any]:
    """What `write_plan` wrote; empty where there is no such file."""
    return read_object(folder / NAME)


def read_choice(folder: Path) -> Choice | None:
    """The choice of a run folder; None: it has none, or it is of another version."""
    found = read_plan(folder).get("choice")
    if not isinstance(found, dict):
        return None
    try:
        tried = tuple(_tried(each) for each in found["tried"])
        chosen = next(each for each in tried if each.name == found["chosen"])
        if found.get("leanest"):
            chosen = dataclasses.replace(chosen, plan=chosen.leanest)
        return Choice(tried, chosen)
    except (KeyError, TypeError, ValueError, StopIteration):
        return None


def file_content(choice: Choice) -> dict[str, Any]:
    """What plan.json holds."""
    plan = choice.chosen.plan
    return {"choice": choice_json(choice), "plan": None if plan is None else plan.to_json()}


def planned_lines(folder: Path) -> list[str]:
    """What was planned for a run folder, and why not what was tried before it, for its log."""
    choice = read_choice(folder)
    if choice is None or choice.chosen.plan is None:
        return []
    device, speed = choice.chosen.plan.device, choice.chosen.plan.speed
    allocated = f"{device.peak.allocated_bytes / 2**30:.3f} GiB allocated in {device.peak.name}"
    lines = [f"planned: {choice.chosen.name}; {allocated}, {speed.step_s:.3g} s a step"]
    return lines + [f"planned: not {reason}" for reason in reasons(choice)]


def plan_entry(choice: Choice) -> dict[str, Any]:
    """What run.json says of it: the choice, its words, and why not those before it."""
    plan = choice.chosen.plan
    return {
        "chosen": choice.chosen.name,
        "overrides": [] if plan is None else list(plan.overrides),
        "reasons": reasons(choice),
    }


def choice_json(choice: Choice) -> dict[str, Any]:
    """A choice in plain values."""
    first = next(each for each in choice.tried if each.name == choice.chosen.name)
    return {
        "tried": [tried_json(each) for each in choice.tried],
        "chosen": choice.chosen.name,
        "leanest": choice.chosen.plan != first.plan,
    }


def tried_json(tried: Tried) -> dict[str, Any]:
    """One fallback in plain values."""
    plans = {"plan": tried.plan, "leanest": tried.leanest}
    shown = {name: None if plan is None else plan.to_json() for name, plan in plans.items()}
    return {"name": tried.name, "refused": tried.refused, **shown}


def _tried(values: Mapping[str, Any]) -> Tried:
    plan, leanest = (
        None if values[name] is None else _plan(values[name]) for name in ("plan", "leanest")
    )
    return Tried(values["name"], plan, values["refused"], leanest)


def _plan(values: Mapping[str, Any]) -> Plan:
    """The inverse of `Plan.to_json`."""
    names = {field.name for field in dataclasses.fields(Plan)}
    own = {name: value for name, value in values.items() if name in names}
    for name in ("overrides", "warnings"):
        own[name] = tuple(own[name])
    for name in ("device", "host"):
        own[name] = _memory(own[name])
    return Plan(**{**own, "speed": Speed(**own["speed"])})


def _memory(values: Mapping[str, Any]) -> Memory:
    phases = tuple(
        Phase(
            PhaseName(each["name"]),
            {Item(name): n for name, n in each["items"].items()},
            each["if_room"],
            each["on_host"],
        )
        for each in values["phases"]
    )
    return Memory(phases, values["slack_bytes"], values["context_bytes"])
