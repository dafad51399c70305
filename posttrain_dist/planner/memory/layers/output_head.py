"""What the head allocates: the fused loss, log-probabilities that carry a gradient, a score."""

from __future__ import annotations

from posttrain_dist.planner.job import Job
from posttrain_dist.planner.memory.adapters.head_weight import HeadWeight, head_weight
from posttrain_dist.planner.memory.autograd import Edge, Graph, Value
from posttrain_dist.planner.memory.ledger import Block
from posttrain_dist.planner.memory.operations import WIDE, cast
from posttrain_dist.planner.plan import Item

# As in posttrain_kernels: passes/chunked.py, passes/matmuls.py and passes/torch_kernels.py.
CHUNK_BYTES_GPU_TRAINED, CHUNK_BYTES_GPU_FROZEN, CHUNK_BYTES_CPU = 1 << 30, 1 << 28, 1 << 26
BLOCK_ELEMENTS, STRIP_ELEMENTS_CPU = 1 << 21, 1 << 18


class HeadSize:
    """Chunks and buffers of the fused head, in bytes.

    Args:
        trained: whether a gradient of the weight is made.
        fast: whether the device multiplies in this dtype (else float32 blocks of the weight).
        more_columns: of hidden states and weight, by an adapter.
    """

    def __init__(
        self,
        job: Job,
        width: int,
        num_rows: int,
        *,
        trained: bool,
        fast: bool,
        more_columns: int = 0,
    ) -> None:
        shape = job.network.shape
        vocabulary, hidden = shape.vocab_size, shape.hidden_size + more_columns
        budget, row = CHUNK_BYTES_CPU, vocabulary * WIDE
        if job.on_gpu:
            budget = CHUNK_BYTES_GPU_TRAINED if trained else CHUNK_BYTES_GPU_FROZEN
            row = vocabulary * width
        most = max(128, budget // max(row, 1) // 128 * 128)
        self.num_chunks = -(-num_rows // most)
        rows = -(-num_rows // max(self.num_chunks, 1))
        stride = -(-vocabulary // 16) * 16 if job.on_gpu else vocabulary
        logit = width if fast else WIDE
        self.logits_bytes = rows * stride * logit
        self.hidden_bytes = num_rows * hidden * width
        self.weight_bytes = vocabulary * hidden * width if trained else 0
        self.sum_bytes = 0  # of the weight's gradient while chunks are added up
        if trained and self.num_chunks > 1 and width < WIDE:
            self.sum_bytes = vocabulary * hidden * WIDE
        # Beside them: strips in float32 of a 16-bit chunk; blocks and copies in float32.
        self.block_bytes = self.product_bytes = 0
        if not fast:
            self.block_bytes = min(max(1, BLOCK_ELEMENTS // hidden), vocabulary) * hidden * WIDE
            self.product_bytes = rows * hidden * WIDE
        elif width < WIDE and not job.on_gpu:
            strip = max(1, STRIP_ELEMENTS_CPU // vocabulary) * vocabulary * WIDE
            part = vocabulary * hidden * width if trained and self.num_chunks > 1 else 0
            self.product_bytes = max(strip, part)
        if shape.softcap and not job.on_gpu:  # its slope and square, strip by strip
            strip = max(1, STRIP_ELEMENTS_CPU // vocabulary)
            self.product_bytes += 2 * min(strip, rows) * vocabulary * WIDE
        self.statistics_bytes = num_rows * (2 * WIDE + 1)


class _Weight:
    """The weight of the head, as it is read and as what its gradient goes to.

    Args:
        name: of the weight, that of the embedding where it is tied.
    """

    def __init__(self, graph: Graph, job: Job, name: str) -> None:
        self.made = head_weight(job, name)
        self.names = (name,) if self.made is None else self.made.names
        self.columns = 0 if self.made is None else self.made.columns
        self.trained = graph.recording and (name in graph.trained or self.made is not None)
        self._name, self._tied = name, job.network.shape.tied

    def give(self, graph: Graph, gradient: Block) -> None:
        """Its gradient was made: to the engine, or to what the weight is made of."""
        if self.made is not None:
            ledger = graph.ledger
            parts = [(each, ledger.allocate(Item.gradients, n)) for each, n in self.made.trained]
            ledger.release(gradient)
            for each, block in parts:
                graph.shards.gradient(each, block)
        elif self._tied:
            graph.waiting[self._name] = gradient
        else:
            graph.shards.gradient(self._name, gradient)


def head_loss(
    graph: Graph, job: Job, hidden: Value, name: str, num_rows: int, *, fast: bool
) -> Value:
    """The loss of the fused head, which makes its gradients in the forward.

    Args:
        name: of the weight, that of the embedding where it is tied.
    """
    ledger, weight = graph.ledger, _Weight(graph, job, name)
    size = HeadSize(
        job,
        graph.width,
        num_rows,
        trained=weight.trained,
        fast=fast,
        more_columns=weight.columns,
    )
    graph.shards.gather(weight.names, backward=False)
    joined = made_weight(graph, job, num_rows, weight.made)
    statistics = ledger.allocate(Item.head, size.statistics_bytes)
    grad_hidden, grad_weight = _chunked_pass(
        graph, size, hidden=graph.recording and hidden.needs_grad
    )
    for block in joined:
        ledger.release(block)
    graph.shards.release(weight.names, backward=False)
    edge: Edge | None = hidden.edge
    graph.item = Item.activations

    def back(_: Block) -> None:
        if grad_weight is not None:
            weight.give(graph, grad_weight)
        if grad_hidden is not None:
            graph.give(edge, grad_hidden)

    loss = graph.custom((hidden,), WIDE, back, width=WIDE)
    ledger.release(statistics)
    return loss


def head_logprob(
    graph: Graph, job: Job, hidden: Value, name: str, num_rows: int, *, fast: bool
) -> Value:
    """log p of every target, whose gradient is known in backward only (`linear_logprob`).

    Backward makes the logits again where the weight is trained. Where it is not, each row's own
    gradient is made in the forward, and multiplied by its factor in backward.

    Args:
        name: as for `head_loss`.
    """
    ledger, weight, width = graph.ledger, _Weight(graph, job, name), graph.width
    size, again = (
        HeadSize(job, width, num_rows, trained=trained, fast=fast, more_columns=weight.columns)
        for trained in (False, weight.trained)
    )
    graph.shards.gather(weight.names, backward=False)
    kept = made_weight(graph, job, num_rows, weight.made)
    logprob = graph.tensor(num_rows * WIDE, Item.head, width=WIDE)
    statistics = ledger.allocate(Item.head, size.statistics_bytes)
    needs_grad = graph.recording and hidden.needs_grad
    unit, _ = _chunked_pass(graph, size, hidden=needs_grad and not weight.trained)
    if not weight.trained:
        for block in kept:
            ledger.release(block)
        kept = [unit] if unit is not None else []
    elif not weight.columns:  # else hidden states with more columns are kept, which are made
        kept.append(ledger.hold(hidden.block))
    graph.shards.release(weight.names, backward=False)
    edge: Edge | None = hidden.edge
    graph.item = Item.activations

    def back(_: Block) -> None:
        grad_weight: Block | None = None
        if weight.trained:
            graph.shards.gather(weight.names, backward=True)
            own = ledger.allocate(Item.head, size.statistics_bytes)
            grad_hidden, grad_weight = _chunked_pass(graph, again, hidden=needs_grad)
            ledger.release(own)
        elif needs_grad:
            wide = num_rows * job.network.shape.hidden_size * WIDE if width < WIDE else 0
            ledger.touch(Item.head, wide + size.hidden_bytes)
            grad_hidden = ledger.allocate(Item.head, size.hidden_bytes)
        else:
            grad_hidden = None
        for block in kept:
            ledger.release(block)
        if grad_weight is not None:
            weight.give(graph, grad_weight)
            graph.shards.release(weight.names, backward=True)
        if grad_hidden is not None:
            graph.give(edge, grad_hidden)

    if not graph.recording:
        for block in kept:
            ledger.release(block)
    loss = graph.custom((hidden,), WIDE, back, width=WIDE)
    ledger.release(statistics)
    del logprob
    return loss


def head_score(graph: Graph, hidden: Value, name: str, num_rows: int) -> Value:
    """One number of every target, in float32, and the loss of them."""
    wide, size = cast(graph, hidden, WIDE), hidden.size // num_rows
    trained = name in graph.trained
    score = graph.op(
        (wide,),
        num_rows * WIDE,
        saves=(wide,) if trained else (),
        parameters=((name, size * graph.width),) if trained else (),
        gathers=(name,),
        width=WIDE,
    )
    return graph.op((score,), WIDE, width=WIDE)


def _chunked_pass(
    graph: Graph, size: HeadSize, *, hidden: bool
) -> tuple[Block | None, Block | None]:
    """`chunked_forward`: the gradients of the hidden states and of the weight, if any are made."""
    ledger, item = graph.ledger, Item.head
    working = [ledger.allocate(item, n) for n in (size.block_bytes, size.logits_bytes) if n]
    grad_hidden = ledger.allocate(item, size.hidden_bytes) if hidden else None
    grad_weight: Block | None = None
    if size.weight_bytes:
        grad_weight = ledger.allocate(item, size.sum_bytes or size.weight_bytes)
    ledger.touch(item, size.product_bytes)
    if grad_weight is not None and size.sum_bytes:
        rounded = ledger.allocate(item, size.weight_bytes)
        ledger.release(grad_weight)
        grad_weight = rounded
    for block in working:
        ledger.release(block)
    return grad_hidden, grad_weight


def made_weight(graph: Graph, job: Job, num_rows: int, made: HeadWeight | None) -> list[Block]:
    """Allocate a weight that an adapter makes for the head, and hidden states with more columns."""
    if made is None:
        return []
    shape = job.network.shape
    width = shape.hidden_size + made.columns
    num_bytes = shape.vocab_size * width * graph.width
    graph.ledger.touch(Item.head, made.copies * num_bytes)
    found = [graph.ledger.allocate(Item.head, num_bytes)]
    if made.columns:
        found.append(graph.ledger.allocate(Item.head, num_rows * width * graph.width))
    return found
