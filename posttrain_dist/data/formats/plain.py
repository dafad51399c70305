"""Rows that no chat template is applied to: text, and tokens that were made elsewhere."""

from __future__ import annotations

from typing import Any

from posttrain_dist.data.formats.turns import read_text
from posttrain_dist.data.read.bad_row import bad_field, kind

IGNORED = -100  # the label of a token that is not supervised
_MAX_TOKEN = (1 << 31) - 1


def read_plain(row: dict[str, Any]) -> str:
    """The text.

    Raises:
        BadRow: it is none, or empty.
    """
    return read_text(row["text"], "text", empty=False)


def read_tokens(row: dict[str, Any]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(input_ids, labels): each label is its own token, or -100; without labels all are supervised.

    Raises:
        BadRow: they are no such lists, or nothing of the row is supervised.
    """
    ids = _integers(row["input_ids"], "input_ids")
    if not ids:
        raise bad_field("input_ids", "is an empty list", "remove the row")
    if not 0 <= min(ids) <= max(ids) <= _MAX_TOKEN:
        at = next(i for i, token in enumerate(ids) if not 0 <= token <= _MAX_TOKEN)
        raise bad_field(f"input_ids[{at}]", f"is {ids[at]}", "write the tokenizer's own ids")
    mask = row.get("attention_mask")
    if mask is not None and _beside(mask, "attention_mask", ids) != [1] * len(ids):
        fix = "remove padding: rows are packed without any"
        raise bad_field("attention_mask", "is not 1 everywhere", fix)
    if row.get("labels") is None:
        return tuple(ids), tuple(ids)
    labels = _beside(row["labels"], "labels", ids)
    for i, (token, label) in enumerate(zip(ids, labels, strict=True)):
        if label != token and label != IGNORED:
            fix = "labels are not shifted: each is the token at its own place, or -100"
            raise bad_field(f"labels[{i}]", f"is {label}, and the token is {token}", fix)
    if all(label == IGNORED for label in labels):
        raise bad_field("labels", "is -100 everywhere: nothing is supervised", "remove the row")
    return tuple(ids), tuple(labels)


def _beside(value: Any, name: str, ids: list[int]) -> list[int]:
    numbers = _integers(value, name)
    if len(numbers) != len(ids):
        what = f"has {len(numbers)} entries, and input_ids has {len(ids)}"
        raise bad_field(name, what, "write one for each token")
    return numbers


def _integers(value: Any, name: str) -> list[int]:
    if not isinstance(value, list):
        raise bad_field(name, f"is {kind(value)}, expected a list of integers", "[1, 2, 3]")
    if not all(type(item) is int for item in value):
        at = next(i for i, item in enumerate(value) if type(item) is not int)
        what = f"is {kind(value[at])}, expected an integer"
        raise bad_field(
            f"{name}[{at}]",
            what if not isinstance(value[at], float) else f"is {value[at]!r}, expected an integer",
            "[1, 2, 3]",
        )
    return value
