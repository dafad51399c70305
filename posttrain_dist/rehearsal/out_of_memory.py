"""Out of memory, as an error that says where, what was planned for it, and what fits instead."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, TracebackType

from posttrain_dist.config import RunConfig
from posttrain_dist.errors import OutOfMemory, PosttrainError, is_out_of_memory
from posttrain_dist.planner.fallbacks import LESS, following, nearest
from posttrain_dist.planner.machine import find_machine
from posttrain_dist.planner.plan import Memory, PhaseName, Tried
from posttrain_dist.planner.plan_file import read_choice

# What a function of ours does when it is on the stack; of several the outermost counts, so that
# the loop keeps no books of what it is at.
_PHASES = {
    "build.build_policy": PhaseName.load,
    "train._resume": PhaseName.load,
    "train._check_first_batch": PhaseName.forward,
    "open_reference._second_model": PhaseName.load,
    "precomputed.complete": PhaseName.reference,
    "live.step": PhaseName.reference,
    "loop.evaluate": PhaseName.evaluate,
    "store.save": PhaseName.save,
    "export.write": PhaseName.export,
    **{
        f"{engine}.{call}": phase
        for engine in ("single", "deepspeed")
        for call, phase in (
            ("forward", PhaseName.forward),
            ("backward", PhaseName.backward),
            ("step", PhaseName.update),
        )
    },
}
_WANTED = re.compile(r"tried to allocate ([\d.,]+) ?(bytes|[KMGT]iB)", re.IGNORECASE)
_LARGER = (
    "posttrain plan --largest data.max_length says how long rows may be, --fewest gpus how many "
    "GPUs it takes"
)


@dataclass(slots=True)
class Reached:
    """How far a training has come: `step` updates are done; None: they have not begun."""

    step: int | None = None

    def place(self, stack: list[str]) -> str:
        """Where it is now, for `where` of an error."""
        if "rehearse.run" in stack:
            return "the rehearsal"
        return "before step 1" if self.step is None else f"step {self.step + 1}"


@contextmanager
def naming_out_of_memory(config: RunConfig, run_folder: Path) -> Iterator[Reached]:
    """Yields what the caller keeps up to date.

    Raises:
        OutOfMemory: in the place of whatever a library raised for it.
    """
    reached = Reached()
    try:
        yield reached
    except Exception as error:
        if isinstance(error, PosttrainError) or not is_out_of_memory(error):
            raise
        stack = _stack(error.__traceback__)
        phase = next((_PHASES[name] for name in stack if name in _PHASES), None)
        doing = f" in the {phase}" if phase else ""
        raise describe(
            f"out of memory{doing}: {_amounts(error)}",
            config,
            run_folder,
            where=reached.place(stack),
            phase=phase,
        ) from error


def describe(
    what: str,
    config: RunConfig,
    run_folder: Path,
    *,
    where: str,
    phase: PhaseName | None = None,
    host: bool = False,
) -> OutOfMemory:
    """The error with what the plan says of it, and what fits instead.

    Args:
        phase: that it happened in; None: not known.
        host: the memory of a host was gone, not that of a device.
    """
    choice = read_choice(run_folder)
    plan = choice.chosen.plan if choice is not None else None
    if plan is not None:
        what += f"; {_planned(plan.host if host else plan.device, phase)}"
    return OutOfMemory(what, where=where, fix=f"{advice(config, run_folder)}; {_LARGER}")


def advice(config: RunConfig, run_folder: Path) -> str:
    """What to do about it: the nearest of what fits by its plan."""
    found = _instead(config, run_folder)
    if found is None or found.plan is None:
        return "use more or larger GPUs"
    words, needs = " ".join(found.plan.overrides), found.plan.device.total_bytes
    return f"use {words} ({found.name}, which takes {_size(needs)} by its plan)"


def _planned(memory: Memory, phase: PhaseName | None) -> str:
    """What a plan has for a phase, and the largest item of it."""
    peak = next((each for each in memory.phases if each.name == phase), memory.peak)
    planned = f"planned were {_size(peak.allocated_bytes)} there"
    if not peak.items:
        return planned
    item = max(peak.items, key=lambda item: peak.items[item])
    return f"{planned}, most of it {item} ({_size(peak.items[item])})"


def _instead(config: RunConfig, run_folder: Path) -> Tried | None:
    """What fits by its plan, and takes clearly less than what ran out; None: nothing is known."""
    choice = read_choice(run_folder)
    after = following(choice) if choice is not None else None
    if after is not None:
        return after.chosen
    plan = choice.chosen.plan if choice is not None else None
    most = None if plan is None else int(LESS * plan.device.total_bytes)
    try:
        return nearest(config, find_machine(config, plans_only=False), most_bytes=most)
    except PosttrainError:  # a model or machine that is not planned
        return None


def _stack(trace: TracebackType | None) -> list[str]:
    """Our own functions, as "file.function", from the outermost on."""
    found = []
    while trace is not None:
        code: CodeType = trace.tb_frame.f_code
        path = Path(code.co_filename)
        if "posttrain_dist" in path.parts:
            found.append(f"{path.stem}.{code.co_name}")
        trace = trace.tb_next
    return found


def _amounts(error: BaseException) -> str:
    """What was asked for, and what was taken already."""
    match = _WANTED.search(str(error))
    wanted = "more was asked for"
    if match is not None:
        number, unit = match.groups()
        amount = _size(int(number)) if unit.lower() == "bytes" else f"{number} {unit}"
        wanted = f"{amount} more were asked for"
    import torch

    from posttrain_dist.metrics.memory_use import private_bytes

    if torch.cuda.is_available():
        total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
        most = torch.cuda.max_memory_allocated()
        return f"{wanted}, and up to {_size(most)} of {_size(total)} had been allocated"
    return f"{wanted}, and the process had {_size(private_bytes())}"


def _size(num_bytes: int) -> str:
    small = num_bytes < 1 << 30
    return f"{num_bytes / 2**20:,.0f} MiB" if small else f"{num_bytes / 2**30:,.2f} GiB"
