"""ZeRO-3's whole parameters on the ledger, as the layers' programs ask for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache

from posttrain_dist.planner.job import Job
from posttrain_dist.planner.memory.engines.ds_settings import (
    ZeroSettings,
    elements,
    layer_of,
    zero_settings,
)
from posttrain_dist.planner.memory.engines.gathering import Call, Held, held_elements
from posttrain_dist.planner.memory.engines.partitions import shard
from posttrain_dist.planner.memory.ledger import Block, Ledger
from posttrain_dist.planner.memory.parameters import Stored, stored_parameters
from posttrain_dist.planner.plan import Item

_OUTER_MODULES, _MODULES_OF_A_LAYER = 3, 4  # without parameters of their own


class Gathered:
    """One block that is as large as what is gathered around the module that runs.

    Where that is looked up in is the order of modules of a whole step, which DeepSpeed knows once
    it has seen one; a program may leave out layers that are like those before.
    """

    def __init__(
        self, job: Job, ledger: Ledger, settings: ZeroSettings, stored: Mapping[str, Stored]
    ) -> None:
        self._job, self._ledger, self._settings = job, ledger, settings
        self._alone = job.workers == 1 and not settings.offload_param  # shards are whole
        self._block: Block | None = None
        self._place = -1
        self._held: Held | None = None
        self._calls, self._elements = _step(job, known=False)
        self._places: dict[tuple[str, bool], list[int]] = {}
        for i, call in enumerate(self._calls):
            for name in call.parameters:
                self._places.setdefault((name, call.backward), []).append(i)

    def before(self, parameters: Sequence[str], *, backward: bool) -> None:
        """A module with these parameters is to run."""
        found = [self._next(name, backward) for name in parameters]
        places = [place for place in found if place is not None]
        if self._alone or not places:
            return
        self._place = min(places)
        self._held = self._elements[self._place]
        self._set(self._held.fetching)
        self._set(self._held.running)

    def after(self) -> None:
        """It ran."""
        if self._held is not None:
            self._set(self._held.after)

    def end(self) -> None:
        """All modules ran: nothing is needed soon."""
        self._set(0)
        self._place, self._held = -1, None

    def know_order(self) -> None:
        """A whole step was seen: from now on DeepSpeed looks ahead."""
        self._elements = _step(self._job, known=True)[1]

    def _next(self, name: str, backward: bool) -> int | None:
        """The call of `name` that is next in the step, or the first where a step begins anew."""
        places = self._places.get((name, backward)) or self._places.get((name, not backward))
        if not places:
            return None
        later = [place for place in places if place >= self._place]
        return later[0] if later else places[0]

    def _set(self, count: int) -> None:
        num_bytes = count * self._job.value_bytes
        if self._block is None:
            self._block = self._ledger.allocate(Item.gathered, num_bytes)
        elif self._block.num_bytes != num_bytes:
            self._ledger.resize(self._block, num_bytes)


@lru_cache(maxsize=8)
def _step(job: Job, *, known: bool) -> tuple[list[Call], list[Held]]:
    """The modules of a step in their order, and what is whole around each.

    Args:
        known: that order is known; else every module fetches and releases what is its own.
    """
    settings = zero_settings(job)
    if not known:
        settings = replace(settings, prefetch_bucket_size=0, max_reuse_distance=0)
    sizes = {}
    for each in stored_parameters(job):
        count = elements(each, job.value_bytes)
        if each.parameter and count > settings.param_persistence_threshold:
            # Packed weights are counted in elements of the model's dtype, as the block is.
            padded = shard(count, job.workers) * job.workers
            sizes[each.name] = padded * each.num_bytes // (count * job.value_bytes)
    modules = _modules(job, settings)
    forward = [Call(names, backward=False) for _, names in modules]
    backward = _backward(job, modules)
    calls = [*forward, *backward]
    return calls, held_elements(calls, sizes, settings)


def _modules(job: Job, settings: ZeroSettings) -> list[tuple[str | None, tuple[str, ...]]]:
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
        if settings.leaf and layer is not None:
            module = f"layer {layer}"
        groups.setdefault(module, []).append(name)
        layers[module] = layer
    found: list[tuple[str | None, tuple[str, ...]]] = [(None, ())] * _OUTER_MODULES
    for module, names in groups.items():
        layer = layers[module]
        if not settings.leaf and layer is not None and found[-1][0] != layer:
            found += [(layer, ())] * _MODULES_OF_A_LAYER
        found.append((layer, tuple(names)))
    return found


def _in_forward_order(job: Job) -> list[str]:
    """Parameters as modules use them: what is inserted comes after what it is inserted beside."""
    stored = [each for each in stored_parameters(job) if each.parameter]
    base = {each.name for each in stored if each.item is not Item.adapter}
    beside: dict[str, list[str]] = {}
    for each in stored:
        if each.name not in base:
            beside.setdefault(each.name.split(".lora_")[0], []).append(each.name)
    found: list[str] = []
    for each in stored:
        if each.name in base:
            found.append(each.name)
            module = each.name.rpartition(".")[0].removesuffix(".base_layer")
            found += beside.pop(module, [])
    return found + [name for names in beside.values() for name in names]


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
