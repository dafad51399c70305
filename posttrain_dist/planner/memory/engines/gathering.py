"""Which parameters are whole on a rank of ZeRO-3, at each moment of a step.

DeepSpeed remembers the order in which modules run, and once it has seen a whole step

    fetches     a module's own parameters before it runs; then up to `prefetch_bucket_size`
                elements of what comes next, at every module, until `max_live_parameters` are whole
    releases    a module's parameters after it ran, unless they are used again within
                `max_reuse_distance` elements of other modules

so that a model of less than a thousand million parameters is whole most of the time. What it does
is repeated here module by module, after runtime/zero/partitioned_param_coordinator.py of deepspeed
0.19.8. Parameters that are gathered together come in one flat tensor; when the first of them is
needed all are copied out of it, and it goes when the last of them was.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from posttrain_dist.planner.memory.engines.ds_settings import ZeroSettings


@dataclass(frozen=True, slots=True)
class Call:
    """One module that runs: its parameters, by name; of the forward or of the backward."""

    parameters: tuple[str, ...]
    backward: bool


@dataclass(frozen=True, slots=True)
class Held:
    """Elements that are gathered around a call: while it is fetched, while it runs, after it."""

    fetching: int
    running: int
    after: int


@dataclass(slots=True)
class _Bundle:
    """What was gathered at once, and which of it nobody has waited for."""

    names: tuple[str, ...]
    flat: int
    waiting: set[str]


@dataclass(slots=True)
class _State:
    own: dict[str, int] = field(default_factory=dict)  # name -> elements of its own tensor
    bundles: dict[str, _Bundle] = field(default_factory=dict)  # of those under way
    counted: int = 0  # DeepSpeed's own count of what is whole
    elements: int = 0  # of own tensors and of bundles

    def keep(self, name: str, size: int) -> None:
        """It has a tensor of its own."""
        self.own[name] = size
        self.elements += size

    def free(self, name: str) -> None:
        """Its own tensor goes."""
        size = self.own.pop(name, 0)
        self.elements -= size
        self.counted -= size

    def gather(self, names: Sequence[str], sizes: Mapping[str, int]) -> None:
        """Start to gather; a single parameter comes into a tensor of its own."""
        self.counted += sum(sizes[name] for name in names)
        if len(names) == 1:
            self.keep(names[0], sizes[names[0]])
            return
        bundle = _Bundle(tuple(names), sum(sizes[name] for name in names), set(names))
        self.elements += bundle.flat
        self.bundles.update(dict.fromkeys(names, bundle))

    def wait(self, name: str, sizes: Mapping[str, int]) -> int:
        """Have a parameter; the most elements on the way."""
        bundle = self.bundles.pop(name, None)
        if bundle is None:
            return self.elements
        if len(bundle.waiting) == len(bundle.names):
            for each in bundle.names:
                self.keep(each, sizes[each])
        most = self.elements
        bundle.waiting.discard(name)
        if not bundle.waiting:
            self.elements -= bundle.flat
        return most

    def has(self, name: str) -> bool:
        """Whether it is whole, or under way."""
        return name in self.own or name in self.bundles


def held_elements(
    calls: Sequence[Call], sizes: Mapping[str, int], settings: ZeroSettings
) -> list[Held]:
    """What is gathered at each call of a step, once the order is known.

    Args:
        sizes: elements of each parameter that is gathered; those that always stay are left out.
    """
    modules = [[name for name in call.parameters if name in sizes] for call in calls]
    uses = [(name, i) for i, names in enumerate(modules) for name in names]
    before = [0]  # elements of the modules that ran before
    for names in modules:
        before.append(before[-1] + sum([sizes[name] for name in names]))
    later: dict[str, list[int]] = {}
    for name, i in reversed(uses):
        later.setdefault(name, []).append(i)  # the next one is last
    state, queued, fetched_for = _State(), 0, dict.fromkeys(sizes, -1)
    found = []
    for i, names in enumerate(modules):
        for name in names:
            later[name].pop()
        fetching = _fetch(names, sizes, state) if names else state.elements
        for name in names:
            if fetched_for[name] < i:
                popped, step = uses[queued]
                fetched_for[popped] = step
                queued += 1
        queued = _prefetch(uses, queued, fetched_for, sizes, state, settings)
        running = state.elements
        for name in names:
            again = later[name][-1] if later[name] else None
            near = again is not None and before[again] - before[i + 1] < settings.max_reuse_distance
            if not near and fetched_for[name] <= i + 1:
                state.free(name)
        found.append(Held(fetching, running, state.elements))
    return found


def own_elements(calls: Sequence[Call], sizes: Mapping[str, int]) -> list[Held]:
    """The same while the order is not known: every module fetches and releases its own."""
    found = []
    for call in calls:
        own = [sizes[name] for name in call.parameters if name in sizes]
        found.append(Held(sum(own) * min(len(own), 2), sum(own), 0))
    return found


def _fetch(names: Sequence[str], sizes: Mapping[str, int], state: _State) -> int:
    """Make a module's parameters whole; the most elements on the way."""
    missing = [name for name in names if not state.has(name)]
    if missing:
        state.gather(missing, sizes)
    return max([state.elements, *[state.wait(name, sizes) for name in names]])


def _prefetch(
    uses: Sequence[tuple[str, int]],
    queued: int,
    fetched_for: dict[str, int],
    sizes: Mapping[str, int],
    state: _State,
    settings: ZeroSettings,
) -> int:
    """Start to gather what comes next; returns the next place in the queue."""
    room = min(settings.max_live_parameters - state.counted, settings.prefetch_bucket_size)
    names: list[str] = []
    elements = 0
    while queued < len(uses) and elements < room:
        name, step = uses[queued]
        queued += 1
        fetched_for[name] = max(fetched_for[name], step)
        if not state.has(name) and name not in names:
            names.append(name)
            elements += sizes[name]
    if names:
        state.gather(names, sizes)
    return queued
