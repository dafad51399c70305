"""ZeRO-3's whole parameters on the ledger, as the layers' programs ask for them."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from operator import add

from posttrain_dist.planner.job import Job, shared_by
from posttrain_dist.planner.memory.engines import base
from posttrain_dist.planner.memory.engines.ds_settings import (
    ZeroSettings,
    elements,
    layer_of,
)
from posttrain_dist.planner.memory.engines.gathering import (
    Call,
    Held,
    held_elements,
    own_elements,
)
from posttrain_dist.planner.memory.engines.partitions import shard
from posttrain_dist.planner.memory.engines.whole_tensors import touch_most
from posttrain_dist.planner.memory.ledger import Block, Ledger
from posttrain_dist.planner.memory.parameters import stored_parameters
from posttrain_dist.planner.plan import Item

_OUTER_MODULES, _MODULES_OF_A_LAYER = 3, 4  # without parameters of their own


class Gathered:
    """One block that is as large as what is gathered around the module that runs.

    Where that is looked up in is the order of modules of a whole step, which DeepSpeed knows once
    it has seen one; a program may leave out layers that are like those before.
    """

    def __init__(self, job: Job, ledger: Ledger, settings: ZeroSettings) -> None:
        self._job, self._ledger, self._settings = job, ledger, settings
        self._value_bytes = job.value_bytes
        self._alone = job.workers == 1 and not settings.offload_param  # shards are whole
        self._block: Block | None = None
        self._place = -1
        self._held: Held | None = None
        self._known = False
        self._step: _Step | None = None

    def before(self, parameters: Sequence[str], *, backward: bool) -> None:
        """A module with these parameters is to run."""
        held = self._move_to(parameters, backward=backward)
        if held is not None:
            self._set(held.fetching * self._value_bytes)
            self._set(held.running * self._value_bytes)

    def after(self) -> None:
        """It ran."""
        if self._held is not None:
            self._set(self._held.after * self._value_bytes)

    def run(
        self, prefix: str, calls: Sequence[base.Call], taken: Sequence[int], *, backward: bool
    ) -> None:
        """Modules run one after the other; of all moments the fullest is enough."""
        if self._alone:
            touch_most(self._ledger, taken)
            return
        whole = self._pass(prefix, calls, backward=backward)
        beside = [0] * len(whole)
        before, during = taken[::2], taken[1::2]
        beside[: 3 * len(before) : 3], beside[2 : 3 * len(during) + 2 : 3] = before, during
        totals = [*map(add, whole, beside)]
        fullest = totals.index(max(totals))
        self._set(whole[fullest])
        self._ledger.touch(Item.activations, beside[fullest])
        self._set(whole[-1])

    def _pass(self, prefix: str, calls: Sequence[base.Call], *, backward: bool) -> list[int]:
        """Bytes that are whole before each call, as it is fetched and as it runs; after the last.

        The same calls at the same place of the step are looked up once.
        """
        now = self._block.num_bytes if self._block is not None else 0
        key = (prefix, calls, backward, self._place, now)
        passes = self._find_step().passes
        if key not in passes:
            found = []
            for call in calls:
                names = [prefix + name for name in call.gathers]
                held = self._move_to(names, backward=backward)
                found.append(now)
                if held is None:
                    found += [now, now]
                else:
                    found += [held.fetching * self._value_bytes, held.running * self._value_bytes]
                    now = held.after * self._value_bytes
            passes[key] = ([*found, now], self._place, self._held)
        whole, self._place, self._held = passes[key]
        return whole

    def end(self) -> None:
        """All modules ran: nothing is needed soon."""
        self._set(0)
        self._place, self._held = -1, None

    def know_order(self) -> None:
        """A whole step was seen: from now on DeepSpeed looks ahead."""
        self._known, self._step = True, None

    def _move_to(self, parameters: Sequence[str], *, backward: bool) -> Held | None:
        """Go on in the step to the next module that has one of the parameters, if any has.

        Behind the last one a step begins again.
        """
        if self._alone:
            return None
        step, found = self._find_step(), []
        for name in parameters:
            places = step.order.places[backward].get(name)
            if places is not None:
                next_one = bisect_left(places, self._place)
                found.append(places[next_one % len(places)])
        if not found:
            return None
        self._place = min(found)
        self._held = step.held[self._place]
        return self._held

    def _find_step(self) -> _Step:
        """When the first module runs, for nothing else needs it."""
        if self._step is None:
            settings = self._settings
            order = _order(self._job, leaf=settings.leaf)
            sizes = _sizes(self._job, settings.param_persistence_threshold)
            self._step = _find_step(order, sizes, settings if self._known else None)
        return self._step

    def _set(self, num_bytes: int) -> None:
        if self._block is None:
            self._block = self._ledger.allocate(Item.gathered, num_bytes)
        else:
            self._ledger.resize(self._block, num_bytes)


@dataclass(frozen=True, slots=True, eq=False)
class _Order:
    """The modules of a step in their order.

    Attributes:
        places: of each parameter those of the modules that have it, in forward and in backward;
            if there are none, those in the other.
    """

    calls: Sequence[Call]
    places: tuple[Mapping[str, Sequence[int]], Mapping[str, Sequence[int]]]


@shared_by("parameters_key", "recomputed_layers")
def _order(job: Job, *, leaf: bool) -> _Order:
    modules = _modules(job, leaf=leaf)
    calls = [Call(names, backward=False) for _, names in modules]
    calls += _backward(job, modules)
    found: tuple[dict[str, list[int]], dict[str, list[int]]] = ({}, {})
    for i, call in enumerate(calls):
        for name in call.parameters:
            found[call.backward].setdefault(name, []).append(i)
    forward, backward = found
    return _Order(calls, (backward | forward, forward | backward))


@shared_by("parameters_key", "workers")
def _sizes(job: Job, threshold: int) -> tuple[tuple[str, int], ...]:
    """Elements of each parameter that is gathered: those above a threshold.

    Packed weights are counted in elements of the model's dtype, as the block is.
    """
    found = []
    for each in stored_parameters(job):
        count = elements(each, job.value_bytes)
        if each.parameter and count > threshold:
            padded = shard(count, job.workers) * job.workers
            found.append((each.name, padded * each.num_bytes // (count * job.value_bytes)))
    return tuple(found)


@dataclass(frozen=True, slots=True)
class _Step:
    """What is whole around each module of a step.

    Attributes:
        passes: what was looked up of it by `Gathered.run`.
    """

    order: _Order
    held: Sequence[Held]
    passes: dict[Hashable, tuple[list[int], int, Held | None]] = field(default_factory=dict)


@lru_cache(maxsize=16)
def _find_step(
    order: _Order, sizes: tuple[tuple[str, int], ...], settings: ZeroSettings | None
) -> _Step:
    """The same for all plans of a search with this order.

    Args:
        settings: None: the order is not known.
    """
    if settings is None:
        return _Step(order, own_elements(order.calls, dict(sizes)))
    return _Step(order, held_elements(order.calls, dict(sizes), settings))


@shared_by("parameters_key")
def _modules(job: Job, *, leaf: bool) -> list[tuple[str | None, tuple[str, ...]]]:
    """(layer, parameters) of every module in the order of the forward.

    Modules without parameters look ahead, too: the model itself and its backbone before anything
    else, and in each layer that is not gathered as one the layer, its attention, its MLP and the
    activation function in there.
    """
    groups: dict[str, list[str]] = {}
    layers: dict[str, str | None] = {}
    for name in _in_forward_order(job):
        layer = layer_of(job, name)
        module = name.rpartition(".")[0]
        if leaf and layer is not None:
            module = f"layer {layer}"
        groups.setdefault(module, []).append(name)
        layers[module] = layer
    found: list[tuple[str | None, tuple[str, ...]]] = [(None, ())] * _OUTER_MODULES
    for module, names in groups.items():
        layer = layers[module]
        if not leaf and layer is not None and found[-1][0] != layer:
            found += [(layer, ())] * _MODULES_OF_A_LAYER
        found.append((layer, tuple(names)))
    if job.network.shape.tied:  # the head reads the embedding once more
        found.append((None, (job.network.before[0].name,)))
    return found


def _in_forward_order(job: Job) -> list[str]:
    """As modules use them: virtual tokens before all, what is inserted behind what it stands in."""
    stored = [each for each in stored_parameters(job) if each.parameter]
    first = [each.name for each in stored if each.item is Item.virtual_tokens]
    inserted = (Item.adapter, Item.virtual_tokens)
    base = [each.name for each in stored if each.item not in inserted]
    ends: dict[str, str] = {}  # of a module, and of those that it stands in: its last parameter
    for name in base:
        module = name.rpartition(".")[0].removesuffix(".base_layer")
        while module:
            ends[module] = name
            module = module.rpartition(".")[0]
    behind: dict[str, list[str]] = {}
    for each in stored:
        if each.item is Item.adapter:
            module = each.name.rpartition(".")[0]
            while module and module not in ends:
                module = module.rpartition(".")[0]
            behind.setdefault(ends.get(module, base[-1]), []).append(each.name)
    return [*first, *(each for name in base for each in (name, *behind.get(name, ())))]


def _backward(job: Job, modules: Sequence[tuple[str | None, tuple[str, ...]]]) -> list[Call]:
    """The modules of the backward; a layer that recomputes runs forward before."""
    calls: list[Call] = []
    i = len(modules)
    while i:
        layer, end = modules[i - 1][0], i
        while i and modules[i - 1][0] == layer:
            i -= 1
        names = [each for _, each in modules[i:end]]
        if layer is not None and int(layer) < job.recomputed_layers:
            calls += [Call(each, backward=False) for each in names]
        calls += [Call(each, backward=True) for each in reversed(names)]
    return calls
