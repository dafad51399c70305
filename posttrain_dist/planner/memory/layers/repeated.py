"""Layers that are alike: the first and the last of them are replayed, those between are counted.

Each layer adds the same to what is alive after its forward, and takes the same while it runs. Of
the layers between, what one keeps is one allocation; their gradients are handed to the engine one
by one, because engines fill buckets, and the calls between two gradients together, of which only
the fullest moment counts. From one call to the next the most that a replayed layer took is noted,
and taken for a moment in each of the counted ones: a bucket may be fullest in the middle of the
stretch.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from posttrain_dist.planner.memory.autograd import Graph, Value
from posttrain_dist.planner.memory.engines.base import Call
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
        with _Watch(graph) as forward:
            x = run(index, x)
        after = graph.ledger.items()
        stretch = _Stretch(
            prefixes=[f"{name}.{i}." for i in range(index + 1, end - 1)],
            growth=[
                (item, after[item] - before[item]) for item in after if item not in _OF_ENGINES
            ],
            calls=tuple(_renamed(call, f"{name}.{index}.") for call in graph.calls[start:]),
            recomputed=recomputed[index],
            forward=forward.taken,
        )
        x = stretch.run(graph, x)
        x = stretch.watched(graph, run(end - 1, x))
        index = end
    return x


class _Watch:
    """Stands before the engine of a graph, and notes what is taken from one call to the next.

    Attributes:
        taken: of each call, the most that there was since the call before it, over what there was
            at first; what engines hold is left out.
    """

    def __init__(self, graph: Graph) -> None:
        self._graph, self._ledger, self._shards = graph, graph.ledger, graph.shards
        self.taken: list[int] = []
        self._first = self._held = 0

    def __enter__(self) -> _Watch:
        self._graph.shards = self
        self._after()
        self._first = self._ledger.total_bytes - self._held
        return self

    def __exit__(self, *_: object) -> None:
        self._before()
        self._graph.shards = self._shards

    def gather(self, parameters: Sequence[str], *, backward: bool) -> None:
        """As the engine does."""
        self._before()
        self._shards.gather(parameters, backward=backward)
        self._after()

    def release(self, parameters: Sequence[str], *, backward: bool) -> None:
        """As the engine does."""
        self._before()
        self._shards.release(parameters, backward=backward)
        self._after()

    def gradient(self, parameter: str, block: Block) -> None:
        """As the engine does."""
        self._before()
        self._shards.gradient(parameter, block)
        self._after()

    def run(
        self, prefix: str, calls: Sequence[Call], taken: Sequence[int], *, backward: bool
    ) -> None:
        """Never: a layer that is watched is replayed."""
        raise AssertionError(prefix)

    def _before(self) -> None:
        self.taken.append(max(0, self._ledger.highest_since() - self._held - self._first))

    def _after(self) -> None:
        self._ledger.highest_since()
        now = self._ledger.items()
        self._held = sum(now.get(item, 0) for item in _OF_ENGINES)


@dataclass
class _Stretch:
    """Equal layers of these prefixes that are counted.

    Attributes:
        growth: what is alive after the forward of one that was not before.
        calls: of one of them, names without their prefix.
        forward: what one takes in forward from call to call (`_Watch.taken`).
        backward: the same of its backward.
    """

    prefixes: Sequence[str]
    growth: Sequence[tuple[Item, int]]
    calls: Sequence[Call]
    recomputed: bool
    forward: Sequence[int]
    backward: _Watch | None = None

    def run(self, graph: Graph, x: Value) -> Value:
        """Their forward, with a backward if there is one."""
        ledger, kept = graph.ledger, []
        for prefix in self.prefixes:
            graph.shards.run(prefix, self.calls, self.forward, backward=False)
            if x.edge is not None:
                kept.append([ledger.allocate(item, n) for item, n in self.growth if n > 0])
        if x.edge is None:  # nothing of them is kept
            return x
        edge = x.edge

        def back(gradient: Block) -> None:
            assert self.backward is not None
            self.backward.__exit__()
            steps = _steps(self.calls, self.backward.taken, recomputed=self.recomputed)
            for prefix in reversed(self.prefixes):
                self._backward(graph, prefix, steps)
                for block in kept.pop():
                    ledger.release(block)
            graph.give(edge, ledger.hold(gradient))

        return graph.through(x, back)

    def watched(self, graph: Graph, x: Value) -> Value:
        """The output of the layer after them, whose backward shows what one of them takes."""
        if x.edge is None:
            return x
        edge = x.edge

        def back(gradient: Block) -> None:
            self.backward = _Watch(graph).__enter__()
            graph.give(edge, graph.ledger.hold(gradient))

        return graph.through(x, back)

    def _backward(self, graph: Graph, prefix: str, steps: Sequence[_Step]) -> None:
        ledger, shards = graph.ledger, graph.shards
        for step in steps:
            if step.frozen:
                shards.run(prefix, step.frozen, step.taken, backward=not step.again)
            else:
                ledger.touch(Item.activations, step.taken[0])
            if step.call is None:
                continue
            names = [prefix + name for name in step.call.gathers]
            shards.gather(names, backward=True)
            for (name, num_bytes), most in zip(step.call.parameters, step.beside, strict=False):
                ledger.touch(Item.activations, most)
                shards.gradient(prefix + name, ledger.allocate(Item.gradients, num_bytes))
            ledger.touch(Item.activations, step.beside[-1])
            shards.release(names, backward=True)


class _Step(NamedTuple):
    """Of the backward of a layer: calls without gradients, and one that has some.

    Attributes:
        taken: beside the frozen calls, and until the other one; see `Shards.run`.
        call: None: there is none behind them.
        beside: what is taken before each of its gradients, and after the last.
        again: the layer's forward is run again.
    """

    frozen: Sequence[Call]
    taken: Sequence[int]
    call: Call | None = None
    beside: Sequence[int] = ()
    again: bool = False


def _steps(calls: Sequence[Call], taken: Sequence[int], *, recomputed: bool) -> list[_Step]:
    """The backward of a layer, of which `taken` is noted from call to call."""
    found: list[_Step] = []
    frozen: list[Call] = []
    between: list[int] = []
    again = 2 * len(calls) if recomputed else 0
    if again:
        found.append(_Step(calls, taken[:again], again=True))
    left = iter(taken[again:])
    for call in reversed(calls):
        between.append(next(left, 0))
        if call.parameters:
            beside = [next(left, 0) for _ in range(len(call.parameters) + 1)]
            found.append(_Step(tuple(frozen), between, call, beside))
            frozen, between = [], []
        else:
            frozen.append(call)
            between.append(next(left, 0))
    return [*found, _Step(tuple(frozen), [*between, next(left, 0)])]


def _renamed(call: Call, prefix: str) -> Call:
    return Call(
        tuple(name.removeprefix(prefix) for name in call.gathers),
        tuple((name.removeprefix(prefix), n) for name, n in call.parameters),
    )
