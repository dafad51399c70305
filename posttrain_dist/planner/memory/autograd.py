"""What torch's autograd allocates: a forward written as operations, and its backward replayed.

A `Value` is a tensor and one Python variable that holds it. `Graph.op` allocates its output, keeps
what its backward will need, and notes how gradients are made; `drop` ends a variable; `backward`
walks the operations from last to first as torch's engine does:

    an operation's backward    gradient of the output, what was saved, its temporaries and the
                               gradients that it makes are all alive at once
    after it                   the gradient of the output goes, then what was saved
    a second gradient          is added in place to the first one of the same value
    a parameter's gradient     goes to the engine, which keeps, reduces or shards it
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from posttrain_dist.planner.memory.ledger import Block, Ledger
from posttrain_dist.planner.plan import Item


class Shards(Protocol):
    """What an engine does around operations; the memory side of `engine/`."""

    def gather(self, parameters: Sequence[str], *, backward: bool) -> None:
        """Before a module runs: its parameters become whole (ZeRO-3)."""

    def release(self, parameters: Sequence[str], *, backward: bool) -> None:
        """After it ran."""

    def gradient(self, parameter: str, block: Block) -> None:
        """A gradient of the whole parameter was made; the engine is its holder from here on."""


class Value:
    """A tensor. A view has the block of another, and passes its gradient on."""

    __slots__ = ("block", "gradient", "needs_grad", "num_bytes")

    def __init__(self, block: Block, num_bytes: int, *, needs_grad: bool) -> None:
        self.block, self.num_bytes, self.needs_grad = block, num_bytes, needs_grad
        self.gradient: Block | None = None  # while backward is under way


@dataclass(slots=True)
class _Node:
    """One operation of the forward, as its backward needs it."""

    inputs: Sequence[Value]
    output: Value
    saved: list[Block]
    grad_bytes: Sequence[int]
    passes_on: bool  # the gradient of the output is that of each input: additions, views
    backward_temporary: int
    parameters: Sequence[tuple[str, int]]  # name, bytes of its gradient
    gathers: Sequence[str]
    run: Callable[[Block], None] | None = None  # of a checkpoint: forward and backward again
    item: Item = field(default=Item.activations)
    temporary_item: Item = field(default=Item.activations)


class Graph:
    """Records a forward on a ledger, and replays its backward.

    Args:
        recording: false under `torch.no_grad`: nothing is kept.
    """

    def __init__(self, ledger: Ledger, shards: Shards, *, recording: bool = True) -> None:
        self.ledger, self.shards, self.recording = ledger, shards, recording
        self._nodes: list[_Node] = []

    # ---------------------------------------------------------------------------- the forward

    def tensor(
        self, num_bytes: int, item: Item = Item.activations, *, needs_grad: bool = False
    ) -> Value:
        """A tensor that no operation here makes."""
        return Value(self.ledger.allocate(item, num_bytes), num_bytes, needs_grad=needs_grad)

    def op(
        self,
        inputs: Sequence[Value],
        num_bytes: int,
        *,
        saves: Iterable[Value] = (),
        saves_output: bool = False,
        saves_bytes: int = 0,
        temporary: int = 0,
        backward_temporary: int = 0,
        grad_bytes: Sequence[int] | None = None,
        parameters: Sequence[tuple[str, int]] = (),
        gathers: Sequence[str] = (),
        item: Item = Item.activations,
        temporary_item: Item = Item.activations,
    ) -> Value:
        """The output of an operation.

        Args:
            inputs: those that may need a gradient.
            num_bytes: of the output.
            saves: what backward reads of the forward; `saves_output` the output too, and
                `saves_bytes` more that nobody else has (a mask, statistics).
            temporary: alive while it runs, beside the output.
            backward_temporary: the same of its backward.
            grad_bytes: of each input's gradient; None: as large as the input.
            parameters: trained ones, name and bytes of the gradient that is made here.
            gathers: parameters that must be whole for it, trained or not.
            item: that output and what is saved count for.
            temporary_item: the same of both temporaries.
        """
        if gathers:
            self.shards.gather(gathers, backward=False)
        if temporary:
            held = self.ledger.allocate(temporary_item, temporary)
        block = self.ledger.allocate(item, num_bytes)
        if temporary:
            self.ledger.release(held)
        needs_grad = bool(parameters) or any(value.needs_grad for value in inputs)
        recorded = self.recording and needs_grad
        output = Value(block, num_bytes, needs_grad=recorded)
        if recorded:
            saved = [self.ledger.hold(value.block) for value in saves]
            saved += [self.ledger.hold(block)] if saves_output else []
            saved += [self.ledger.allocate(item, saves_bytes)] if saves_bytes else []
            sizes = grad_bytes or [value.num_bytes for value in inputs]
            self._nodes.append(
                _Node(
                    list(inputs),
                    output,
                    saved,
                    sizes,
                    False,
                    backward_temporary,
                    list(parameters),
                    list(gathers),
                    item=item,
                    temporary_item=temporary_item,
                )
            )
        if gathers:
            self.shards.release(gathers, backward=False)
        return output

    def view(self, value: Value) -> Value:
        """Another variable of the same tensor: reshape, transpose, slice."""
        output = Value(self.ledger.hold(value.block), value.num_bytes, needs_grad=value.needs_grad)
        self._note_passing([value], output)
        return output

    def add(self, left: Value, right: Value, item: Item = Item.activations) -> Value:
        """Their sum, which keeps nothing; its gradient is that of both."""
        block = self.ledger.allocate(item, left.num_bytes)
        needs_grad = self.recording and (left.needs_grad or right.needs_grad)
        output = Value(block, left.num_bytes, needs_grad=needs_grad)
        self._note_passing([left, right], output)
        return output

    def checkpoint(self, run: Callable[[Graph, Value], Value], value: Value) -> Value:
        """`run(graph, value)`, of which only the input is kept; backward runs it again.

        Chen et al., arXiv:1604.06174.
        """
        recording, self.recording = self.recording, False
        output = run(self, value)
        self.recording = recording
        if not recording:
            return output
        output.needs_grad = True
        saved = [self.ledger.hold(value.block)]

        def again(gradient: Block) -> None:
            inner = Graph(self.ledger, self.shards)
            start = Value(self.ledger.hold(value.block), value.num_bytes, needs_grad=True)
            end = run(inner, start)
            inner.drop(start)
            inner.drop(end)
            end.gradient = self.ledger.hold(gradient)
            inner._walk()
            made, start.gradient = start.gradient, None
            if made is not None:
                self._give(value, made)

        node = _Node([value], output, saved, [], False, 0, (), (), run=again)
        self._nodes.append(node)
        return output

    def drop(self, *values: Value) -> None:
        """Python variables end."""
        for value in values:
            self.ledger.release(value.block)

    # --------------------------------------------------------------------------- the backward

    def backward(self, value: Value) -> None:
        """Replay from `value`, whose gradient is as large as itself; the graph is used up."""
        value.gradient = self.ledger.allocate(Item.activations, value.num_bytes)
        self._walk()

    def _walk(self) -> None:
        nodes, self._nodes = self._nodes, []
        while nodes:
            node = nodes.pop()
            gradient, node.output.gradient = node.output.gradient, None
            if gradient is not None:
                self._step_back(node, gradient)
            for block in node.saved:
                self.ledger.release(block)

    def _step_back(self, node: _Node, gradient: Block) -> None:
        if node.gathers:
            self.shards.gather(node.gathers, backward=True)
        if node.run is not None:
            node.run(gradient)
            self.ledger.release(gradient)
        elif node.passes_on:
            for value in node.inputs:
                if value.needs_grad:
                    self._give(value, self.ledger.hold(gradient))
            self.ledger.release(gradient)
        else:
            held = self.ledger.allocate(node.temporary_item, node.backward_temporary)
            made = [
                (value, self.ledger.allocate(Item.activations, size))
                for value, size in zip(node.inputs, node.grad_bytes, strict=True)
                if value.needs_grad
            ]
            whole = [
                (name, self.ledger.allocate(Item.gradients, size)) for name, size in node.parameters
            ]
            self.ledger.release(held)
            self.ledger.release(gradient)
            for value, block in made:
                self._give(value, block)
            for name, block in whole:
                self.shards.gradient(name, block)
        if node.gathers:
            self.shards.release(node.gathers, backward=True)

    def _give(self, value: Value, block: Block) -> None:
        """A gradient of `value`; a second one is added in place to the first, if nobody has it."""
        if value.gradient is None:
            value.gradient = block
            return
        first = value.gradient
        if first.holders > 1:
            value.gradient = self.ledger.allocate(first.item, first.num_bytes)
            self.ledger.release(first)
        self.ledger.release(block)

    def _note_passing(self, inputs: Sequence[Value], output: Value) -> None:
        if self.recording and output.needs_grad:
            self._nodes.append(_Node(inputs, output, [], [], True, 0, (), ()))
