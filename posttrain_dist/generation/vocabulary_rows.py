"""How many tokens an adapter has rows for, by its own files; its base may have fewer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

# What stands between the name of a table of tokens and `.weight`.
_INSIDE = (".base_layer", ".modules_to_save")
_PREFIX = "base_model.model."


def table_sizes(
    shapes: Mapping[str, Sequence[int]], embeddings: str, head: str | None
) -> dict[str, int]:
    """Rows of the embeddings and of the head, where an adapter holds them as a whole.

    Args:
        shapes: of the adapter's tensors, by their names in its file.
        embeddings: name of the module in the base model.
        head: likewise; None: it has none.
    """
    found = {}
    for name, shape in shapes.items():
        module, _, leaf = name.removeprefix(_PREFIX).rpartition(".")
        for inside in _INSIDE:
            module = module.removesuffix(inside)
        if leaf == "weight" and module in (embeddings, head):
            found[module] = int(shape[0])
    return found


def last_trained_token(config: Mapping[str, Any]) -> int:
    """The largest id of the rows that an adapter holds one by one; -1: none."""
    trained = config.get("trainable_token_indices") or {}
    lists = list(trained.values()) if isinstance(trained, Mapping) else [trained]
    return max((int(i) for ids in lists for i in ids), default=-1)
