"""What a turn, or a row as a whole, says of its weight in the loss."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from posttrain_dist.data.read.bad_row import BadRow, bad_field
from posttrain_dist.data.read.json_lines import load

WEIGHT_LIMIT = 1_000_000  # a weight is below it
_RANGE = f"write a number from 0 to below {WEIGHT_LIMIT:,}"
# Other words for it on a row -> the values that change nothing; null never does.
_ALL = (True, 1)
SPELLINGS: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("loss", "loss_weight", "sample_weight", "row_weight", "loss_mask"), _ALL),
    **dict.fromkeys(("trainable", "training", "train_detail", "train_on"), _ALL),
    "masked": (False, 0),
    "mask": (),  # it says either: left out, or kept
}
ROW_KEYS = ("train", "weight")
_READ = (
    'write "train": false (the row, or a turn, is not trained on) or "weight": 0.5 on the row or '
    "on a turn; or rename the key where it is a note"
)


def read_weight(keys: dict[str, Any], path: str) -> float | None:
    """What `train` and `weight` of a turn or a row say; null where they say nothing.

    Args:
        path: of the turn, with a dot behind it; empty for the row.

    Raises:
        BadRow: one has no such value, or they contradict each other.
    """
    train, weight = keys.get("train"), keys.get("weight")
    if train is not None and not isinstance(train, bool):
        raise bad_field(f"{path}train", f"is {train!r}", "write true or false")
    if weight is None:
        return None if train is None else float(train)
    if isinstance(weight, bool) or not isinstance(weight, int | float):
        raise bad_field(f"{path}weight", f"is {weight!r}, expected a number", _RANGE)
    if not 0 <= weight < WEIGHT_LIMIT:  # nor is NaN
        what = f"is {weight!r}, and a weight is from 0 to below {WEIGHT_LIMIT:,}"
        raise bad_field(f"{path}weight", what, _RANGE)
    if train is False and weight:
        raise bad_field(f"{path}weight", f"is {weight!r} beside train: false", "keep one of them")
    return float(weight)


def read_row_weight(row: dict[str, Any]) -> float:
    """The factor of all weights in a row, 1 where it says nothing; 0: it is not trained on.

    Raises:
        BadRow: it says so under a key that is not read, or with no such value.
    """
    refuse_weights(row, SPELLINGS, _READ)
    said = {name: _of_text(row[name]) for name in ROW_KEYS if name in row}
    weight = read_weight(said, "") if said else None
    return 1.0 if weight is None else weight


def refuse_weights(row: dict[str, Any], names: Iterable[str], fix: str) -> None:
    """See that what is said under these keys changes nothing.

    Raises:
        BadRow: one of them would.
    """
    for name in [name for name in names if name in row]:
        value = _of_text(row[name])
        if value not in (None, "", [], {}, *SPELLINGS.get(name, _ALL)):
            what = "is not read, and it would change what is trained"
            raise bad_field(name, what, fix)


def _of_text(value: Any) -> Any:
    """What the text of a cell means: CSV has nothing but text, and pandas writes True and False."""
    if not isinstance(value, str) or not value:
        return value
    try:
        return load(value.lower().encode())
    except BadRow:
        return value
