"""A small batch of the first and the last sample: what a loaded model is checked with."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from posttrain_dist.data.packs.collate import collate
from posttrain_dist.data.prepared.arrays import Examples
from posttrain_dist.flow import Batch

MAX_TOKENS = 64  # of each of them


def make_probe(examples: Examples, *, own_rows: bool = False) -> Batch:
    """The first tokens of the first sample and of the last, every second one supervised.

    Where the last one follows another, it stands behind the first tokens of that one, too.

    Args:
        own_rows: see `Objective.own_rows`; the last token alone is then supervised.
    """
    last = len(examples) - 1
    above = np.flatnonzero(examples.sample_ids == examples[last].parent)
    probes = []
    for place in dict.fromkeys([0, *above.tolist(), last]):
        example = examples[place]
        ids_L = example.input_ids_L[:MAX_TOKENS]
        place_L = torch.arange(len(ids_L))
        weight_L = (place_L == len(ids_L) - 1 if own_rows else place_L % 2 == 1).float().numpy()
        parent = example.parent if place == last and len(above) else None
        probe = replace(example, input_ids_L=ids_L, weight_L=weight_L, parent=parent, unit=None)
        probes.append(probe)
    return collate(probes, own_rows=own_rows)
