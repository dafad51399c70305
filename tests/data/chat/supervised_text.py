"""What comes of a row, for several tests (loaded by path: tests/ is no package)."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from posttrain_dist.data import Form, Template
from posttrain_dist.data.chat.encoder import Encoder, RowExamples
from posttrain_dist.flow import Record


def one(result: RowExamples) -> SimpleNamespace:
    """The single example of a row, with the checks that the row fails."""
    (example,), faults, _ = result
    return SimpleNamespace(
        input_ids_L=example.input_ids_L,
        weight_L=example.weight_L,
        truncated=example.truncated,
        faults=tuple(faults),
    )


def supervised(tokenizer: Any, row: Record, **choice: Any) -> list[str]:
    """The supervised text of the one sample, run by run."""
    encoded = one(
        Encoder(
            tokenizer, Template(**{"form": Form.conversation, **choice}), max_length=9999
        ).encode(row)
    )
    runs: list[list[int]] = [[]]
    for token, weight in zip(encoded.input_ids_L, encoded.weight_L, strict=True):
        if weight:
            runs[-1].append(int(token))
        elif runs[-1]:
            runs.append([])
    return [tokenizer.decode(run) for run in runs if run]
