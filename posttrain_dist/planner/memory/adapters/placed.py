"""Which linear layers of a network a tuning changes, found by the rules of the tuning itself."""

from __future__ import annotations

from posttrain_dist.models.network.tensors import Linear, Network, Tensor
from posttrain_dist.models.quantized import holds_nf4
from posttrain_dist.planner.job import Job, shared_by
from posttrain_dist.tuning.base import AdapterTuning, Quantize
from posttrain_dist.tuning.ia3 import Ia3
from posttrain_dist.tuning.injection.targets import matching
from posttrain_dist.tuning.lora import Lora


def head_of(network: Network) -> Tensor | None:
    """The weight of an untied head."""
    return next((tensor for tensor in network.head if len(tensor.shape) == 2), None)


def embedding_of(network: Network) -> Tensor:
    """The table of input embeddings."""
    rows = network.shape.vocab_size
    return next(tensor for tensor in network.before if tensor.shape[:1] == (rows,))


def on_nf4(job: Job) -> bool:
    """Whether the layers' matrices are in NF4: as the tuning wants it, or as they are stored."""
    tuning = job.tuning
    asked = isinstance(tuning, AdapterTuning) and tuning.quantize is Quantize.nf4
    return asked or holds_nf4(job.network.config)


@shared_by("parameters_key")
def lora_targets(job: Job) -> dict[str, Linear]:
    """The layers that have A and B, by name; none for other tunings."""
    if not isinstance(job.tuning, Lora):
        return {}
    return {one.name: one for one in matching(list(job.network.linears()), job.tuning.targets)}


@shared_by("parameters_key")
def ia3_targets(job: Job) -> tuple[dict[str, Linear], dict[str, Linear]]:
    """The layers whose output a vector scales, and those whose input; none for other tunings."""
    if not isinstance(job.tuning, Ia3):
        return {}, {}
    outputs, inputs = job.tuning.scaled(list(job.network.linears()))
    return {one.name: one for one in outputs}, {one.name: one for one in inputs}


def wrapped(job: Job) -> frozenset[str]:
    """The layers that a layer of `peft` stands around, so that their weight is in `base_layer`."""
    outputs, inputs = ia3_targets(job)
    return frozenset((*lora_targets(job), *outputs, *inputs))
