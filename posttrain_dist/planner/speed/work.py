"""What one micro-batch is of work: operations, bytes that pass through memory, kernels.

Counted from the network's layers. A product of N rows with a matrix of P elements is 2 N P
operations; backward has one for the gradient of its input, and one for that of the matrix if it is
trained. Attention is counted over the keys that a token sees. The rest of a layer is bound by
memory: what the operations of transformers read and write, of which norms are the most, in float32.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

from posttrain_dist.models.network.tensors import Layer, Linear
from posttrain_dist.planner.job import Job
from posttrain_dist.planner.memory.adapters.placed import head_of, lora_targets, on_nf4
from posttrain_dist.planner.memory.parameters import stored_parameters
from posttrain_dist.planner.objective.objective_facts import HeadKind
from posttrain_dist.planner.objective.reference_passes import reference_job
from posttrain_dist.planner.plan import Item
from posttrain_dist.tuning.full import Full
from posttrain_dist.tuning.lora import Lora

_NF4_BYTES = 0.53  # of a weight, with its constants
# Bytes of each element and byte of a value: an RMSNorm goes to float32 and back, operation by
# operation; compiled, or as one kernel, it reads and writes once.
_EAGER_NORM, _FUSED_NORM = 18.0, 2.0
_ADD, _GATE, _FUSED_GATE, _ACTIVATION, _ROTATION = 3.0, 5.0, 3.0, 2.0, 10.0
_EAGER_SCORES = 10.0  # of each pair of tokens and head: scores, mask, softmax in float32
_BACKWARD = 2.0  # times what forward moves
_KERNELS_OF_LAYER = 50  # beside linears and adapters, forward
_KERNELS_OF_ADAPTER = 5


@dataclass(frozen=True, slots=True)
class Work:
    """Of one GPU.

    Attributes:
        products: operations of matrix products; attention: of attention.
        moved: bytes read and written by everything else.
    """

    products: float = 0.0
    attention: float = 0.0
    moved: float = 0.0
    kernels: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(
            self.products + other.products,
            self.attention + other.attention,
            self.moved + other.moved,
            self.kernels + other.kernels,
        )

    def times(self, factor: float) -> Work:
        """So much of it."""
        return Work(
            self.products * factor,
            self.attention * factor,
            self.moved * factor,
            self.kernels * factor,
        )


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Of one micro-batch: what forward does, and what backward, with what it runs again.

    Attributes:
        passes: forwards without gradients, of a reference or of the policy before the update.
    """

    forward: Work
    backward: Work
    passes: tuple[Work, ...] = ()


def micro_batch(job: Job) -> MicroBatch:
    """The work of a micro-batch of `job.row_tokens` tokens."""
    forward, backward = _outside(job)
    head, head_backward = _head(job)
    forward, backward = forward + head, backward + head_backward
    last = len(job.network.layers) - 1
    # Layers that are alike are counted once.
    kinds = Counter(
        (layer, window, i < job.recomputed_layers, i == last)
        for i, (layer, window) in enumerate(
            zip(job.network.layers, job.network.shape.window_L, strict=True)
        )
    )
    for (layer, window, again, is_last), count in kinds.items():
        once = _forward(job, layer, window, is_last)
        forward += once.times(count)
        backward += _backward(job, layer, once, is_last).times(count)
        if again:
            backward += once.times(count)
    adapters = _adapters(job)
    recomputed = job.recomputed_layers / max(1, len(job.network.layers))
    facts, other = job.objective, reference_job(job)
    passes = [alone(job)] if facts.old_logprob else []
    if other is not None and not facts.precomputes:
        passes.append(alone(other))
    return MicroBatch(
        forward + adapters,
        backward + adapters.times(_BACKWARD + recomputed),
        tuple(passes),
    )


def alone(job: Job) -> Work:
    """A forward of the micro-batch without gradients."""
    work = _outside(job)[0] + _head_pass(job, 1)
    last = len(job.network.layers) - 1
    windows = zip(job.network.layers, job.network.shape.window_L, strict=True)
    kinds = Counter((layer, window, i == last) for i, (layer, window) in enumerate(windows))
    for (layer, window, is_last), count in kinds.items():
        work += _forward(job, layer, window, is_last).times(count)
    return work + _adapters(job)


def keys_seen(sample_tokens: int, window: int | None) -> float:
    """Mean number of keys that a token of a sample attends to, itself included."""
    if window is None or window >= sample_tokens:
        return (sample_tokens + 1) / 2
    return window - window * (window - 1) / (2 * sample_tokens)


def row_keys(job: Job, window: int | None) -> float:
    """Mean number of keys that a token of the row attends to, of samples it follows too."""
    if not any(job.row_before):
        return keys_seen(job.sample_tokens, window)

    def up_to(tokens: int) -> float:
        return tokens * keys_seen(tokens, window) if tokens else 0.0

    rows = zip(job.row_before, job.row_lengths, strict=True)
    return sum(up_to(before + n) - up_to(before) for before, n in rows) / job.row_tokens


def model_flops(job: Job) -> float:
    """Of a token, forward and backward, as MFU counts them: 6 N, and attention.

    Weights that are not trained have no gradient: 4 of each. Adapters are too small to count.
    """
    shape = job.network.shape
    tables = sum(t.size for t in job.network.before if len(t.shape) == 2)
    head = shape.vocab_size * shape.hidden_size if shape.tied else 0
    weights = job.network.num_parameters - tables + head
    keys = sum(row_keys(job, window) for window in shape.window_L)
    width = shape.widest_head + shape.value_head_dim
    of_each = 6.0 if job.tuning.whole_model else 4.0
    return of_each * weights + 3 * 2 * keys * shape.num_heads * width


# ------------------------------------------------------------------------------------ layers


def _forward(job: Job, layer: Layer, window: int | None, is_last: bool) -> Work:
    tokens, value = job.row_tokens, job.value_bytes
    shape = job.network.shape
    products = sum(
        2.0 * _rows(job, linear, is_last) * linear.in_features * linear.out_features
        for linear in layer.linears
    )
    eager = job.attention == "eager"
    keys = float(job.sample_tokens) if eager else row_keys(job, window)
    width = shape.widest_head + shape.value_head_dim
    attention = 2.0 * tokens * keys * shape.num_heads * width
    moved = tokens * value * _elementwise(job, layer, is_last)
    if eager:
        moved += tokens * keys * shape.num_heads * value * _EAGER_SCORES
    kernels = _KERNELS_OF_LAYER + len(layer.linears)
    return Work(products, attention, moved + _dequantised(job, layer), kernels)


def _backward(job: Job, layer: Layer, forward: Work, is_last: bool) -> Work:
    trained = isinstance(job.tuning, Full)
    dequantised = _dequantised(job, layer)
    moved = _BACKWARD * (forward.moved - dequantised) + dequantised
    if trained:  # its gradients are added to those of the micro-batches before
        moved += 3.0 * job.value_bytes * layer.size
    return Work(
        forward.products * (2 if trained else 1),
        # Five products instead of two; without a kernel of its own nothing is computed again.
        forward.attention * (2.0 if job.attention == "eager" else 2.5),
        moved,
        1.5 * forward.kernels,
    )


def _rows(job: Job, linear: Linear, is_last: bool) -> float:
    """Rows that a linear layer multiplies: the last MLP has the supervised ones only."""
    share = job.supervised_share if is_last and linear.part == "mlp" else 1.0
    return job.row_tokens * share


def _elementwise(job: Job, layer: Layer, is_last: bool) -> float:
    """Values that norms, residual sums, rotations and activations move for each token."""
    shape, fused = job.network.shape, job.model.compile
    norms = [t for t in layer.others if len(t.shape) == 1 and t.name.endswith(".weight")]
    biased = any(t.name.endswith("norm.bias") or ".ln_" in t.name for t in layer.others)
    norm = _FUSED_NORM if fused or biased else _EAGER_NORM
    moved = 2 * _ADD * shape.hidden_size
    for tensor in norms:
        heads = 1
        if tensor.size < shape.hidden_size:  # of each head
            heads = shape.num_kv_heads if ".k_" in f".{tensor.name}" else shape.num_heads
        moved += norm * tensor.size * heads
    if len(job.network.before) == 1:  # positions are rotations
        moved += _ROTATION * shape.head_dim * (shape.num_heads + shape.num_kv_heads)
    mlp = [linear for linear in layer.linears if linear.part == "mlp"]
    if mlp:
        inner = mlp[-1].in_features
        gated = sum(linear.out_features for linear in mlp[:-1]) > inner
        gate = (_FUSED_GATE if fused else _GATE) if gated else _ACTIVATION
        moved += gate * inner * (job.supervised_share if is_last else 1.0)
    return moved


def _dequantised(job: Job, layer: Layer) -> float:
    """Bytes that making the layer's weights of NF4 moves, once."""
    if not on_nf4(job):
        return 0.0
    weights = sum(linear.in_features * linear.out_features for linear in layer.linears)
    return weights * (_NF4_BYTES + job.value_bytes)


# ---------------------------------------------------------------------- outside of the layers


def _outside(job: Job) -> tuple[Work, Work]:
    """Embedding, forward and backward."""
    shape, value, tokens = job.network.shape, job.value_bytes, job.row_tokens
    embedding = 2.0 * tokens * shape.hidden_size * value
    full = isinstance(job.tuning, Full)
    table = 3.0 * value * shape.vocab_size * shape.hidden_size if full else 0.0
    return Work(0.0, 0.0, embedding, 10), Work(0.0, 0.0, embedding + table, 10)


def _head(job: Job) -> tuple[Work, Work]:
    """The head, forward and backward.

    A loss makes its gradients in forward, chunk by chunk. Log-probabilities do so too where the
    weight is frozen; else backward makes the logits again.
    """
    full = isinstance(job.tuning, Full)
    if full and job.objective.head is HeadKind.logprob:
        return _head_pass(job, 1), _head_pass(job, 3)
    return _head_pass(job, 3 if full else 2), Work()


def _head_pass(job: Job, products: int) -> Work:
    """So many products of targets with the head's weight, and what goes over the logits."""
    if job.objective.head is HeadKind.score:
        return Work()
    shape = job.network.shape
    supervised = job.row_tokens * job.supervised_share
    weight = head_of(job.network)
    size = weight.size if weight is not None else shape.vocab_size * shape.hidden_size
    logits = supervised * shape.vocab_size * job.value_bytes
    return Work(2.0 * products * supervised * size, 0.0, (5 if products > 1 else 2) * logits, 10)


def _adapters(job: Job) -> Work:
    """Forward of what a tuning inserts: each of its matrices once for every token."""
    matrices = [
        each.shape
        for each in stored_parameters(job)
        if each.item is Item.adapter and each.trained and len(each.shape) == 2
    ]
    if isinstance(job.tuning, Full) or not matrices:
        return Work()
    value, tokens = job.value_bytes, job.row_tokens
    products = 2.0 * tokens * sum(math.prod(shape) for shape in matrices)
    targets = lora_targets(job).values()
    # The input is read; the product is written, multiplied and added to the layer's output.
    widths = sum(one.in_features + 6 * one.out_features for one in targets)
    moved = float(tokens * value * widths)
    if not targets:
        moved = float(tokens * value * sum(2 * sum(shape) for shape in matrices))
    work = Work(products, 0.0, moved, _KERNELS_OF_ADAPTER * max(len(matrices) / 2, len(targets)))
    if isinstance(job.tuning, Lora) and job.tuning.dora:
        rank = job.tuning.rank
        whole = sum(
            2.0 * rank * one.in_features * (one.in_features + one.out_features) for one in targets
        )
        read = sum(one.in_features * (one.in_features + 8 * one.out_features) for one in targets)
        work += Work(whole, 0.0, float(read * value), 10 * len(targets))
    return work
