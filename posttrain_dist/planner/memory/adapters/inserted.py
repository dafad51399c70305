"""The tensors that a tuning brings, by the names that they have in the model."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

from posttrain_dist.models.network.tensors import Tensor
from posttrain_dist.planner.job import Job
from posttrain_dist.planner.memory.adapters.placed import (
    embedding_of,
    head_of,
    ia3_targets,
    lora_targets,
)
from posttrain_dist.planner.memory.stored import Stored
from posttrain_dist.planner.plan import Item
from posttrain_dist.tuning.bottleneck.adapters_format import sublayers
from posttrain_dist.tuning.bottleneck.bottleneck_tuning import Bottleneck, Placement
from posttrain_dist.tuning.lora import Lora, LoraInit
from posttrain_dist.tuning.prefix_tuning import Prefix
from posttrain_dist.tuning.prompt_tuning import Prompt, PTuning

_ID_BYTES = 8


def inserted(job: Job) -> Iterator[Stored]:
    """Parameters and buffers beside the base model, in the dtype of the model."""
    yield from _low_rank(job)
    yield from _scales(job)
    yield from _bottlenecks(job)
    yield from _virtual(job)
    yield from added_rows(job)


def bottleneck_width(job: Job, tuning: Bottleneck) -> int:
    """Between the two matrices of an adapter."""
    return job.network.shape.hidden_size // tuning.reduction


def bottleneck_places(job: Job, tuning: Bottleneck) -> tuple[str, ...]:
    """The sublayers of a decoder layer that have an adapter, by name."""
    attention, mlp = sublayers(job.network.shape.model_type)
    return (attention, mlp) if tuning.placement is Placement.houlsby else (mlp,)


def _low_rank(job: Job) -> Iterator[Stored]:
    tuning = job.tuning
    for name, linear in lora_targets(job).items():
        assert isinstance(tuning, Lora)
        a = (tuning.rank, linear.in_features)
        b = (linear.out_features, tuning.rank)
        yield _parameter(job, f"{name}.lora_A.default.weight", a)
        yield _parameter(job, f"{name}.lora_B.default.weight", b)
        if tuning.dora:
            magnitude = (linear.out_features,)
            yield _parameter(job, f"{name}.lora_magnitude_vector.default.weight", magnitude)
        if tuning.init is LoraInit.pissa:
            for leaf, shape in (("pissa_initial_A", a), ("pissa_initial_B", b)):
                tensor = Tensor(f"{name}.{leaf}", shape)
                num_bytes = tensor.size * job.value_bytes
                yield Stored(tensor.name, shape, num_bytes, Item.adapter, False, parameter=False)


def _scales(job: Job) -> Iterator[Stored]:
    outputs, inputs = ia3_targets(job)
    for name, linear in outputs.items():
        yield _parameter(job, f"{name}.ia3_l.default", (linear.out_features, 1))
    for name, linear in inputs.items():
        yield _parameter(job, f"{name}.ia3_l.default", (1, linear.in_features))


def _bottlenecks(job: Job) -> Iterator[Stored]:
    tuning = job.tuning
    if not isinstance(tuning, Bottleneck):
        return
    width, hidden = bottleneck_width(job, tuning), job.network.shape.hidden_size
    for i in range(len(job.network.layers)):
        for place in bottleneck_places(job, tuning):
            name = f"{job.network.layers_name}.{i}.{place}.bottleneck"
            yield from _linear(job, f"{name}.down", hidden, width)
            yield from _linear(job, f"{name}.up", width, hidden)


def _virtual(job: Job) -> Iterator[Stored]:
    tuning, shape = job.tuning, job.network.shape
    width = embedding_of(job.network).shape[1]
    kind = Item.virtual_tokens
    if isinstance(tuning, Prompt):
        yield _parameter(job, "prompt.weight", (tuning.ensemble * tuning.tokens, width), kind)
    elif isinstance(tuning, PTuning):
        yield _parameter(job, "prompt_encoder.embedding.weight", (tuning.tokens, width), kind)
        sizes = [width, *[tuning.hidden_size or width] * tuning.layers, width]
        for i, (before, after) in enumerate(pairwise(sizes)):
            yield from _linear(job, f"prompt_encoder.mlp_head.{2 * i}", before, after, kind)
    elif isinstance(tuning, Prefix):
        pairs = shape.num_layers * 2 * shape.num_kv_heads * shape.head_dim
        yield _parameter(job, "prefix.weight", (tuning.tokens, pairs), kind)


def added_rows(job: Job) -> Iterator[Stored]:
    """Rows of `model.add_tokens`, which a frozen matrix has beside it; a tied head shares them."""
    tuning = job.tuning
    count = len(job.model.add_tokens) if isinstance(tuning, Lora) else 0
    head = head_of(job.network)
    tables = [embedding_of(job.network), *([] if head is None else [head])]
    for table in tables if count else []:
        if tuning.trained(table.name):  # one of modules_to_save
            continue
        name = f"{table.name.removesuffix('.weight')}.token_adapter"
        yield _parameter(job, f"{name}.trainable_tokens_delta", (count, table.shape[1]))
        ids = f"{name}.token_ids"
        yield Stored(ids, (count,), count * _ID_BYTES, Item.adapter, False, parameter=False)


def _linear(
    job: Job, name: str, before: int, after: int, item: Item = Item.adapter
) -> Iterator[Stored]:
    yield _parameter(job, f"{name}.weight", (after, before), item)
    yield _parameter(job, f"{name}.bias", (after,), item)


def _parameter(job: Job, name: str, shape: tuple[int, ...], item: Item = Item.adapter) -> Stored:
    num_bytes = Tensor(name, shape).size * job.value_bytes
    return Stored(name, shape, num_bytes, item, job.tuning.trained(name))
