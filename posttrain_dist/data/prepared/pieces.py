"""A sample's tokens as text, for people."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt


def pieces(
    input_ids_L: npt.NDArray[np.integer], weight_L: npt.NDArray[np.float32], tokenizer: Any
) -> list[list[Any]]:
    """[text, weight, whether a special token] of each token, or of those that share a character."""
    special = set(tokenizer.all_special_ids)
    special |= {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    found: list[list[Any]] = []
    ids: list[int] = []
    for token, weight in zip(input_ids_L.tolist(), weight_L.tolist(), strict=True):
        ids.append(token)
        text = tokenizer.decode(ids)
        if text.endswith("\ufffd") and len(ids) < 8:
            continue  # in the middle of a character
        found.append([text, weight, token in special])
        ids = []
    if ids:
        found.append([tokenizer.decode(ids), 0.0, False])
    return found
