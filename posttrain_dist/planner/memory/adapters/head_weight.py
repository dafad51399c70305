"""The weight that the fused head multiplies with, where an adapter makes it: `models/head.py`.

LoRA            [W, B]: V rows of D + r, with hidden states [x, scale A x]
DoRA            the same, each row scaled; the length of W + scale B A on the way
added tokens    W with trained rows in it
"""

from __future__ import annotations

from dataclasses import dataclass

from posttrain_dist.planner.job import Job
from posttrain_dist.planner.memory.adapters.inserted import added_rows
from posttrain_dist.planner.memory.adapters.placed import lora_targets
from posttrain_dist.planner.memory.parameters import stored_parameters
from posttrain_dist.tuning.lora import Lora


@dataclass(frozen=True, slots=True)
class HeadWeight:
    """A weight that is made in each forward, and has a gradient.

    Attributes:
        columns: beside the D of the hidden size.
        copies: how many tensors of its size are alive while it is made; one stays.
        trained: what its gradient is taken apart into, name and bytes.
        names: of the parameters that are read.
    """

    columns: int
    copies: int
    trained: tuple[tuple[str, int], ...]
    names: tuple[str, ...]


def head_weight(job: Job, name: str) -> HeadWeight | None:
    """None: the parameter `name` is read as it is.

    Args:
        name: of the weight of the head, or of the embeddings where they are tied.
    """
    module, tuning = name.removesuffix(".weight"), job.tuning
    if module in lora_targets(job):
        assert isinstance(tuning, Lora)
        trained = tuple(
            (each.name, each.num_bytes)
            for each in stored_parameters(job)
            if each.name.startswith(f"{module}.lora_") and each.trained
        )
        copies = 3 if tuning.dora else 1
        return HeadWeight(tuning.rank, copies, trained, (f"{module}.base_layer.weight",))
    rows = tuple(
        (each.name, each.num_bytes)
        for each in added_rows(job)
        if each.trained and each.name.startswith(f"{module}.")
    )
    return HeadWeight(0, 1, rows, (name,)) if rows else None
