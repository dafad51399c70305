"""Layers that are alike, replayed as a few of them: a plan of 80 layers costs that of six.

What a layer leaves behind in the forward is the same for each layer of a kind, and so is what its
backward takes away and adds. The memory of a stretch of such layers therefore rises and falls along
straight lines, whose ends are its highest points: some layers at both ends of a stretch are
replayed, and those between stand on the ledger as what one of them leaves, times their number.
Their gradients reach the engine one by one, for it counts them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

from posttrain_dist.planner.job import Job
from posttrain_dist.planner.memory.autograd import Graph, Value
from posttrain_dist.planner.memory.ledger import Block
from posttrain_dist.planner.memory.parameters import stored_parameters
from posttrain_dist.planner.memory.stored import Stored
from posttrain_dist.planner.plan import Item

ENDS = 4  # periods that are replayed at each end of a stretch: buckets fill at other places
_OF_ENGINES = (Item.gathered, Item.buckets, Item.gradients)  # which go again by themselves
_LONGEST_PERIOD = 6  # layers after which the kinds repeat, as in Gemma 3

OneLayer = Callable[[int, Value], Value]


def through_layers(graph: Graph, job: Job, one: OneLayer, x: Value) -> Value:
    """Hidden states behind the last layer.

    Args:
        one: the replay of one layer, by its index.
    """
    for start, period, count in stretches(job):
        left_out = count - 2 * ENDS
        if left_out <= 0:
            for index in range(start, start + period * count):
                x = one(index, x)
            continue
        middle, top = (start + period * n for n in (ENDS, count - ENDS))
        before: dict[Item, int] = {}
        for index in range(start, middle):
            if index == middle - period:
                before = graph.ledger.now()
            x = one(index, x)
        if graph.recording:
            x = _stand_in(graph, job, x, before, range(middle, top), left_out)
        for index in range(top, start + period * count):
            x = one(index, x)
    return x


def _stand_in(
    graph: Graph, job: Job, x: Value, before: dict[Item, int], layers: range, count: int
) -> Value:
    """What `layers` leave, where one period of them made `before` what is allocated now."""
    ledger = graph.ledger
    now = ledger.now()
    left = {item: (now[item] - before[item]) * count for item in now if item not in _OF_ENGINES}
    trained = _trained_by_layer(job)
    blocks: list[list[Block]] = [[] for _ in range(count)]
    edge, below = x.edge, x.block

    def back(gradient: Block) -> None:
        per_period = len(layers) // count
        for number in reversed(range(count)):
            for block in blocks[number]:
                ledger.release(block)
            first = layers.start + number * per_period
            for index in reversed(range(first, first + per_period)):
                for each in reversed(trained[index]):
                    made = ledger.allocate(Item.gradients, each.num_bytes)
                    graph.shards.gradient(each.name, made)
        ledger.release(below)
        graph.give(edge, ledger.hold(gradient))

    if edge is not None or any(trained[index] for index in layers):
        ledger.hold(below)
        x = graph.custom((x,), x.num_bytes, back, x.width)
        now = {item: ledger.now()[item] - now[item] for item in now}  # of the output itself
        for item in left:
            share = (left[item] - now[item]) // count
            for each in blocks:
                each += [ledger.allocate(item, share)] if share > 0 else []
    return x


@lru_cache(maxsize=8)
def stretches(job: Job) -> tuple[tuple[int, int, int], ...]:
    """(first layer, layers of a period, periods) of each stretch, in order; the last layer alone.

    The layers of a period may differ, each from the next; those of two periods do not.
    """
    network = job.network
    trained = _trained_by_layer(job)
    kinds = [
        (
            id(layer),
            network.shape.window_L[index],
            index < job.recomputed_layers,
            tuple(each.shape for each in trained[index]),
        )
        for index, layer in enumerate(network.layers)
    ]
    found, start, end = [], 0, len(kinds) - 1
    while start < end:
        period, count = max(
            ((p, _periods(kinds, start, end, p)) for p in range(1, _LONGEST_PERIOD + 1)),
            key=lambda pair: (pair[0] * pair[1] * (pair[1] > 2 * ENDS), -pair[0]),
        )
        if count <= 2 * ENDS:
            period, count = 1, 1
        found.append((start, period, count))
        start += period * count
    return (*found, (end, 1, 1))


def _periods(kinds: list[tuple[object, ...]], start: int, end: int, period: int) -> int:
    """How often the first `period` kinds from `start` on stand there, one after the other."""
    count = 1 if start + period <= end else 0
    while count and start + (count + 1) * period <= end:
        here = start + count * period
        if kinds[here : here + period] != kinds[start : start + period]:
            break
        count += 1
    return count


@lru_cache(maxsize=8)
def _trained_by_layer(job: Job) -> tuple[tuple[Stored, ...], ...]:
    """What is trained of each layer, in the order of the network."""
    found: list[list[Stored]] = [[] for _ in job.network.layers]
    prefix = f"{job.network.layers_name}."
    for each in stored_parameters(job):
        # An adapter's names may stand behind a wrapper's: base_model.model.model.layers.0 ...
        _, marker, rest = each.name.partition(prefix)
        index = rest.partition(".")[0]
        if each.trained and marker and index.isdigit():
            found[int(index)].append(each)
    return tuple(map(tuple, found))
