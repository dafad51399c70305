"""What torch's autograd allocates: a forward written as operations, and its backward replayed.

A `Value` is a Python variable that holds a tensor: where Python lets go of it, so does the ledger,
as torch does. So a program (`layers/`) that is written like the modeling code of transformers frees
what that frees. `Graph.op` allocates an output, keeps what backward will need, and notes how
gradients are made. `Graph.backward` walks the operations from last to first as torch's engine does:

    an operation's backward    gradient of the output, what was saved, its temporaries and the
                               gradients that it makes are all alive at once
    after it                   the gradient of the output goes, then what was saved
    a second gradient          is added in place to the first one of the same value, if nobody else
                               holds that one, and it is no view; else into a new tensor
    a parameter's gradient     goes to the engine, which keeps, reduces or shards it
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence

from posttrain_dist.planner.memory.engines.base import Call, Shards
from posttrain_dist.planner.memory.ledger import Block, Ledger
from posttrain_dist.planner.plan import Item


class Edge:
    """Where the gradient of a value gathers while backward is under way."""

    __slots__ = ("gradient",)

    def __init__(self) -> None:
        self.gradient: Block | None = None


class Value:
    """A variable that holds a tensor; views share its block, and its edge or one of their own.

    Attributes:
        width: bytes of an element.
        edge: None: it needs no gradient.
    """

    __slots__ = ("_ledger", "block", "edge", "num_bytes", "width")

    def __init__(
        self, ledger: Ledger, block: Block, num_bytes: int, width: int, edge: Edge | None
    ) -> None:
        self._ledger: Ledger | None = ledger
        self.block, self.num_bytes, self.width, self.edge = block, num_bytes, width, edge

    @property
    def needs_grad(self) -> bool:
        """Whether it gets a gradient."""
        return self.edge is not None

    @property
    def size(self) -> int:
        """Number of elements."""
        return self.num_bytes // self.width

    def end(self) -> None:
        """The variable ends; called by Python where nothing refers to it any more."""
        if self._ledger is not None:
            self._ledger.release(self.block)
            self._ledger = None

    __del__ = end


class _Node:
    """One operation of the forward, as its backward needs it."""

    __slots__ = (
        *("gathers", "grads", "inputs", "outputs", "parameters", "run", "saved"),
        *("temporary", "temporary_item", "viewed"),
    )

    def __init__(
        self, inputs: Sequence[Edge | None], outputs: Sequence[Edge], saved: list[Block]
    ) -> None:
        self.inputs, self.outputs, self.saved = inputs, outputs, saved
        self.grads: Sequence[int] | None = None  # None: they are that of the output itself
        self.viewed = False
        self.temporary, self.temporary_item = 0, Item.activations
        self.parameters: Sequence[tuple[str, int]] = ()
        self.gathers: Sequence[str] = ()
        self.run: Callable[[Block], None] | None = None  # does all of it


class Graph:
    """Records a forward on a ledger, and replays its backward.

    Args:
        width: bytes of an element of what has no width of its own: 2 in bfloat16, 4 in float32.
        trained: names of the parameters that get a gradient.
        recording: false under `torch.no_grad`: nothing is kept.
    """

    def __init__(
        self,
        ledger: Ledger,
        shards: Shards,
        *,
        width: int = 2,
        trained: Collection[str] = frozenset(),
        recording: bool = True,
    ) -> None:
        self.ledger, self.shards, self.recording = ledger, shards, recording
        self.width, self.trained = width, trained
        self.item = Item.activations  # that what is made counts for
        # Gradients of parameters that another operation adds to: a tied head's.
        self.waiting: dict[str, Block] = {}
        self.prefix: Value | None = None  # keys and values that every layer reads (prefix tuning)
        self.training = True  # noise is on, also where nothing is recorded
        self.drops = True  # ... and dropout
        self.calls: list[Call] = []  # of the forward, in its order
        self.per_layer_inputs: Value | None = None  # Gemma 4: of all layers, beside hidden states
        self.kept: list[Value] = []  # what many operations save, for as long as it is here
        self._nodes: list[_Node] = []

    # ---------------------------------------------------------------------------- the forward

    def tensor(
        self, num_bytes: int, item: Item | None = None, *, needs_grad: bool = False, width: int = 0
    ) -> Value:
        """A tensor that no operation here makes."""
        block = self.ledger.allocate(item or self.item, num_bytes)
        return self._value(block, num_bytes, width, needs_grad)

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
        item: Item | None = None,
        temporary_item: Item | None = None,
        width: int = 0,
        viewed: bool = False,
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
            item: that output and what is saved count for; `temporary_item`: temporaries.
            width: bytes of an element of the output; 0: that of the graph.
            viewed: gradients of inputs are views of what was made (products of [1, T, D] with
                matrices), to which torch adds nothing in place.
        """
        ledger, item = self.ledger, item or self.item
        if gathers:
            self.calls.append(Call(gathers, parameters))
            self.shards.gather(gathers, backward=False)
        held = ledger.allocate(temporary_item or item, temporary) if temporary else None
        block = ledger.allocate(item, num_bytes)
        if held is not None:
            ledger.release(held)
        recorded = self.recording and (
            bool(parameters) or any(value.edge is not None for value in inputs)
        )
        output = self._value(block, num_bytes, width, recorded)
        if recorded:
            saved = [ledger.hold(value.block) for value in saves]
            if saves_output:
                saved.append(ledger.hold(block))
            if saves_bytes:
                saved.append(ledger.allocate(item, saves_bytes))
            node = self._note(inputs, (output,), saved)
            node.grads = grad_bytes or [value.num_bytes for value in inputs]
            node.temporary, node.temporary_item = backward_temporary, temporary_item or self.item
            node.parameters, node.gathers, node.viewed = parameters, gathers, viewed
        if gathers:
            self.shards.release(gathers, backward=False)
        return output

    def view(self, value: Value) -> Value:
        """Another variable of the same tensor: reshape, transpose; its gradient is that of it."""
        block = self.ledger.hold(value.block)
        return Value(self.ledger, block, value.num_bytes, value.width, value.edge)

    def part(self, value: Value, num_bytes: int) -> Value:
        """A slice, whose gradient becomes one of the whole tensor, filled up with zeros."""
        block = self.ledger.hold(value.block)
        output = self._value(block, num_bytes, value.width, self._follows(value))
        if output.edge is not None:
            self._note((value,), (output,), []).grads = [value.num_bytes]
        return output

    def split(self, value: Value, sizes: Sequence[int]) -> list[Value]:
        """Its parts, of so many bytes each, as views; in backward their gradients are joined."""
        needs_grad = self._follows(value)
        outputs = [
            self._value(self.ledger.hold(value.block), size, value.width, needs_grad)
            for size in sizes
        ]
        if needs_grad:
            self._note((value,), outputs, []).grads = [value.num_bytes]
        return outputs

    def join(self, values: Sequence[Value]) -> Value:
        """torch.cat; the gradient of each is a view of that of the whole."""
        num_bytes = sum(value.num_bytes for value in values)
        return self._passing(values, num_bytes, values[0].width)

    def add(self, left: Value, right: Value, item: Item | None = None) -> Value:
        """Their sum, which keeps nothing; its gradient is that of both."""
        return self._passing((left, right), left.num_bytes, left.width, item)

    def custom(
        self, inputs: Sequence[Value], num_bytes: int, run: Callable[[Block], None], width: int = 0
    ) -> Value:
        """An output whose backward is `run(gradient)`; it calls `give` and frees what it holds."""
        block = self.ledger.allocate(self.item, num_bytes)
        output = self._value(block, num_bytes, width, self.recording)
        if output.edge is not None:
            self._note(inputs, (output,), []).run = run
        return output

    def through(self, value: Value, run: Callable[[Block], None]) -> Value:
        """The same tensor, behind a step whose backward is `run(gradient)`, as in `custom`."""
        output = self._value(self.ledger.hold(value.block), value.num_bytes, value.width, True)
        self._note((value,), (output,), []).run = run
        return output

    def checkpoint(
        self, run: Callable[[Graph, Value], Value], value: Value, *, offload: bool = False
    ) -> Value:
        """`run(graph, value)`, of which only the input is kept; backward runs it again.

        Chen et al., arXiv:1604.06174, as `torch.utils.checkpoint` without reentry.

        Args:
            offload: the input waits in the memory of the host.
        """
        if not self.recording:
            return run(self, value)
        self.recording = False
        output = run(self, value)
        self.recording = True
        output.edge = Edge()
        needs_grad, edge = value.needs_grad, value.edge
        num_bytes, width = value.num_bytes, value.width
        kept = [] if offload else [self.ledger.hold(value.block)]

        def again(gradient: Block) -> None:
            inner = Graph(self.ledger, self.shards, width=self.width, trained=self.trained)
            inner.item, inner.training, inner.prefix = self.item, self.training, self.prefix
            inner.drops = self.drops
            inner.per_layer_inputs = self.per_layer_inputs
            if offload:
                kept.append(self.ledger.allocate(Item.checkpoints, num_bytes))
            held, inside = self.ledger.hold(kept[0]), Edge() if needs_grad else None
            start = Value(self.ledger, held, num_bytes, width, inside)
            end = run(inner, start)
            start.end()
            if end.edge is not None:
                end.edge.gradient = self.ledger.hold(gradient)
                end.end()
                inner._walk()
            self.ledger.release(kept.pop())
            if start.edge is not None and start.edge.gradient is not None:
                self.give(edge, start.edge.gradient)

        self._note((value,), (output,), []).run = again
        return output

    def drop(self, *values: Value) -> None:
        """Python variables end before their scope does."""
        for value in values:
            value.end()

    # --------------------------------------------------------------------------- the backward

    def backward(self, value: Value) -> None:
        """Replay from `value`, whose gradient is as large as itself; the graph is used up."""
        assert value.edge is not None, "nothing that is trained"
        value.edge.gradient = self.ledger.allocate(self.item, value.num_bytes)
        self._walk()

    def give(self, edge: Edge | None, block: Block) -> None:
        """A gradient of a value; whoever calls this is no holder of it any more."""
        if edge is None:
            self.ledger.release(block)
        elif edge.gradient is None:
            edge.gradient = block
        else:
            first = edge.gradient
            if first.holders > 1 or first.viewed:
                edge.gradient = self.ledger.allocate(first.item, first.num_bytes)
                self.ledger.release(first)
            self.ledger.release(block)

    def _walk(self) -> None:
        nodes, self._nodes = self._nodes, []
        while nodes:
            node = nodes.pop()
            gradients = [edge.gradient for edge in node.outputs if edge.gradient is not None]
            for edge in node.outputs:
                edge.gradient = None
            if gradients:
                self._step_back(node, gradients)
            else:
                self._free(node.saved)

    def _step_back(self, node: _Node, gradients: list[Block]) -> None:
        ledger = self.ledger
        if node.gathers:
            self.shards.gather(node.gathers, backward=True)
        if node.run is not None:
            node.run(gradients[0])
            self._free(gradients)
        elif node.grads is None:
            for edge in node.inputs:
                if edge is not None:
                    self.give(edge, ledger.hold(gradients[0]))
            self._free(gradients)
        else:
            made = [
                (edge, ledger.allocate(self.item, size))
                for edge, size in zip(node.inputs, node.grads, strict=True)
                if edge is not None
            ]
            whole = [
                (name, ledger.allocate(Item.gradients, size)) for name, size in node.parameters
            ]
            if node.temporary:
                ledger.touch(node.temporary_item, node.temporary)
            self._free(gradients)
            self._free(node.saved)
            for edge, block in made:
                block.viewed = node.viewed
                self.give(edge, block)
            for name, block in whole:
                first = self.waiting.pop(name, None)
                if first is not None:
                    ledger.release(block)
                self.shards.gradient(name, first or block)
        if node.gathers:
            self.shards.release(node.gathers, backward=True)

    # ----------------------------------------------------------------------------- its parts

    def _value(self, block: Block, num_bytes: int, width: int, needs_grad: bool) -> Value:
        edge = Edge() if needs_grad else None
        return Value(self.ledger, block, num_bytes, width or self.width, edge)

    def _follows(self, *values: Value) -> bool:
        return self.recording and any(value.edge is not None for value in values)

    def _passing(
        self, values: Sequence[Value], num_bytes: int, width: int, item: Item | None = None
    ) -> Value:
        block = self.ledger.allocate(item or self.item, num_bytes)
        output = self._value(block, num_bytes, width, self._follows(*values))
        if output.edge is not None:
            self._note(values, (output,), [])
        return output

    def _note(self, inputs: Sequence[Value], outputs: Sequence[Value], saved: list[Block]) -> _Node:
        edges = [value.edge for value in outputs if value.edge is not None]
        self._nodes.append(_Node([value.edge for value in inputs], edges, saved))
        return self._nodes[-1]

    def _free(self, blocks: Iterable[Block]) -> None:
        for block in blocks:
            self.ledger.release(block)
