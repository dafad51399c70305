"""Every tensor that is in memory once the tuning is attached, and which of them are trained.

Names and bytes are those of the model that `models/load.py` and `tuning/` make. What is inserted
has the dtype of the model; float32 masters are of the optimizer (`moments.py`).
"""

from __future__ import annotations

from collections.abc import Iterator

from posttrain_dist.models.network.tensors import Tensor
from posttrain_dist.models.quantized import nf4_tensor_bytes
from posttrain_dist.planner.job import Job, shared_by
from posttrain_dist.planner.memory.adapters.inserted import inserted
from posttrain_dist.planner.memory.adapters.placed import on_nf4, wrapped
from posttrain_dist.planner.memory.stored import Stored as Stored
from posttrain_dist.planner.plan import Item

CONSTANTS = ".quant_state"  # ends the name of what a packed weight is read with


@shared_by("parameters_key")
def stored_parameters(job: Job) -> tuple[Stored, ...]:
    """Base weights in the order of the network, packed ones with their constants, then adapters.

    Raises:
        ConfigError: the tuning names layers that the network has not.
    """
    return (*_base(job), *inserted(job))


@shared_by("parameters_key")
def stored_bytes(job: Job) -> dict[Item, int]:
    """Of all of them, by what they are for."""
    found: dict[Item, int] = {}
    for each in stored_parameters(job):
        found[each.item] = found.get(each.item, 0) + each.num_bytes
    return found


@shared_by("parameters_key")
def trained_parameters(job: Job) -> tuple[Stored, ...]:
    """Those that have a gradient and moments."""
    return tuple(each for each in stored_parameters(job) if each.trained)


@shared_by("parameters_key")
def kept_as_they_are(job: Job) -> int:
    """Bytes of what is not trained and belongs to the checkpoints of a small tuning."""
    stored = stored_parameters(job)
    return sum(s.num_bytes for s in stored if not s.trained and job.tuning.kept(s.name))


def _base(job: Job) -> Iterator[Stored]:
    """The model's own parameters, named as after `attach`."""
    linears = job.network.linears() if on_nf4(job) else ()
    quantised = {f"{one.name}.weight": one for one in linears if one.part != "outside"}
    moved = wrapped(job)
    for tensor in job.network.tensors():
        module, _, leaf = tensor.name.rpartition(".")
        name = f"{module}.base_layer.{leaf}" if module in moved else tensor.name
        trained = job.tuning.trained(name)
        if tensor.name in quantised:
            # A weight of GPT-2 is turned before it is packed.
            turned = quantised[tensor.name].transposed
            yield from _packed(job, Tensor(name, tensor.shape[::-1] if turned else tensor.shape))
        else:
            num_bytes = tensor.size * job.value_bytes
            yield Stored(name, tensor.shape, num_bytes, Item.weights, trained)


def _packed(job: Job, tensor: Tensor) -> Iterator[Stored]:
    packed, constants = nf4_tensor_bytes(tensor.size, job.value_bytes)
    yield Stored(tensor.name, tensor.shape, packed, Item.weights, False)
    name = tensor.name + CONSTANTS
    yield Stored(name, (), constants, Item.quantisation, False, parameter=False)
