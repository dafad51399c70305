"""Layers that are alike: the first and the last of them are replayed, those between are counted.

Each layer adds the same to what is alive after its forward, and takes the same while it runs. So
the fullest moment of a stretch of equal layers is in its first or its last one, in forward and in
backward: between them memory rises or falls by equal steps. Of the layers between, the activations
are one allocation; their parameters are gathered and their gradients handed to the engine one by
one, because engines look ahead and fill buckets.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

from posttrain_dist.planner.memory.autograd import Call, Graph, Value
from posttrain_dist.planner.memory.ledger import Block
from posttrain_dist.planner.plan import Item

_LEAST = 4  # equal layers of a stretch that is shortened
# What an engine allocates in the course of a forward is no part of a layer.
_OF_ENGINES = frozenset({Item.gathered, Item.buckets, Item.gradients, Item.weights})


def run_layers(
    graph: Graph,
    x: Value,
    kinds: Sequence[Hashable],
    recomputed: Sequence[bool],
    run: Callable[[int, Value], Value],
    name: str,
) -> Value:
    """All layers; equal ones of `kinds` are alike but for the names of their parameters.

    The first layer stands alone: its input may need no gradient.

    Args:
        recomputed: whether a layer runs again in backward.
        run: index and hidden states -> hidden states.
        name: what stands before the index in the names of parameters.
    """
    index = 0
    while index < len(kinds):
        end = index
        while end < len(kinds) and kinds[end] == kinds[index]:
            end += 1
        if index == 0 or end - index < _LEAST:
            x = run(index, x)
            index += 1
            continue
        before, start = graph.ledger.items(), len(graph.calls)
        x = run(index, x)
        after = graph.ledger.items()
        growth = {item: after[item] - before[item] for item in after if item not in _OF_ENGINES}
        calls = [_renamed(call, f"{name}.{index}.") for call in graph.calls[start:]]
        between = [f"{name}.{i}." for i in range(index + 1, end - 1)]
        x = _count(graph, x, between, growth, calls, recomputed=recomputed[index])
        x = run(end - 1, x)
        index = end
    return x


def _count(
    graph: Graph,
    x: Value,
    prefixes: Sequence[str],
    growth: dict[Item, int],
    calls: Sequence[Call],
    *,
    recomputed: bool,
) -> Value:
    """The layers of these prefixes; `calls` are of one of them, names without their prefix."""
    ledger, shards = graph.ledger, graph.shards

    def gather(prefix: str, call: Call, *, backward: bool) -> list[str]:
        names = [prefix + name for name in call.gathers]
        shards.gather(names, backward=backward)
        return names

    def forward(prefix: str) -> None:
        for call in calls:
            shards.release(gather(prefix, call, backward=False), backward=False)

    for prefix in prefixes:
        forward(prefix)
    blocks = [ledger.allocate(item, n * len(prefixes)) for item, n in growth.items() if n > 0]
    if x.edge is None:  # nothing of them is kept
        for block in blocks:
            ledger.release(block)
        return x

    def back(gradient: Block) -> None:
        for block in blocks:
            ledger.release(block)
        for prefix in reversed(prefixes):
            if recomputed:
                forward(prefix)
            for call in reversed(calls):
                names = gather(prefix, call, backward=True)
                for name, num_bytes in call.parameters:
                    shards.gradient(prefix + name, ledger.allocate(Item.gradients, num_bytes))
                shards.release(names, backward=True)
        graph.give(edge, ledger.hold(gradient))

    edge = x.edge
    return graph.through(x, back)


def _renamed(call: Call, prefix: str) -> Call:
    return Call(
        tuple(name.removeprefix(prefix) for name in call.gathers),
        tuple((name.removeprefix(prefix), n) for name, n in call.parameters),
    )
