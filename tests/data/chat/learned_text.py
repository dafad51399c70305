"""What a sample teaches, as text, for several tests (loaded by path: tests/ is no package)."""

from __future__ import annotations

from typing import Any

from posttrain_dist.data import Template
from posttrain_dist.data.chat.encoder import Encoder
from posttrain_dist.flow import Record


def learned(tokenizer: Any, row: Record, **choice: Any) -> list[str]:
    """What is learned of the one sample, run by run."""
    (encoded,) = Encoder(tokenizer, Template(**choice), max_length=9999).encode(row)
    runs: list[list[int]] = [[]]
    for token, weight in zip(encoded.input_ids_L, encoded.weight_L, strict=True):
        if weight:
            runs[-1].append(int(token))
        elif runs[-1]:
            runs.append([])
    return [tokenizer.decode(run) for run in runs if run]
