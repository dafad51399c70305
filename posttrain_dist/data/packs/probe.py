"""A small batch of the first and the last sample: what a loaded model is checked with."""

from __future__ import annotations

from dataclasses import replace

import torch

from posttrain_dist.data.packs.collate import collate
from posttrain_dist.data.prepared.arrays import Examples
from posttrain_dist.flow import Batch

MAX_TOKENS = 64  # of each of the two


def make_probe(examples: Examples, *, own_rows: bool = False) -> Batch:
    """The first tokens of the first sample and of the last, every second one supervised.

    Args:
        own_rows: see `Objective.own_rows`; the last token alone is then supervised.
    """
    probes = []
    for example in (examples[0], examples[len(examples) - 1]):
        ids_L = example.input_ids_L[:MAX_TOKENS]
        place_L = torch.arange(len(ids_L))
        weight_L = (place_L == len(ids_L) - 1 if own_rows else place_L % 2 == 1).float().numpy()
        probe = replace(example, input_ids_L=ids_L, weight_L=weight_L)
        probes.append(replace(probe, parent=None, unit=None))  # whose prompt is not there
    return collate(probes, own_rows=own_rows)
