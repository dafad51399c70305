"""A sample of a conversation turn by turn, for people."""

from __future__ import annotations

from itertools import groupby
from typing import Any, NamedTuple

from posttrain_dist.flow import Example


class TurnView(NamedTuple):
    """A stretch of targets, and what stands before it."""

    prompt: str  # behind the turn before, or from the beginning of the sample
    trained: str
    end: str  # the token that ends the turn; empty: none does


def view_turns(example: Example, tokenizer: Any) -> list[TurnView]:
    """The turns of a sample that are trained on, in order; what follows the last is left out."""
    added = tokenizer.added_tokens_decoder
    found: list[TurnView] = []
    prompt = ""
    pairs = zip(example.input_ids_L.tolist(), example.weight_L.tolist(), strict=True)
    for is_target, group in groupby(pairs, key=lambda pair: pair[1] > 0):
        ids = [token for token, _ in group]
        if not is_target:
            prompt = tokenizer.decode(ids)
            continue
        end = tokenizer.decode(ids[-1:]) if ids[-1] in added else ""
        found.append(TurnView(prompt, tokenizer.decode(ids[:-1] if end else ids), end))
        prompt = ""
    return found
