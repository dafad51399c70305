"""`chat_template_kwargs` of a row: what the chat template reads beside messages and tools."""

from __future__ import annotations

from typing import Any

from posttrain_dist.data import CLOCK, RESERVED_VARIABLES, is_date
from posttrain_dist.data.read.bad_row import BadRow, bad_field, kind
from posttrain_dist.data.read.json_lines import load

KEY = "chat_template_kwargs"
_FIX = f'write an object, such as "{KEY}": {{"enable_thinking": false}}, or its JSON text'


def read_template_kwargs(row: dict[str, Any]) -> dict[str, Any]:
    """The variables, an object or its JSON text; null is an absent variable.

    Raises:
        BadRow: it is neither, or names what `apply_chat_template` takes for itself.
    """
    value = row.get(KEY)
    if isinstance(value, str):
        try:
            value = load(value.encode()) if value.strip() else None
        except BadRow as error:
            raise bad_field(KEY, error.what, _FIX) from error
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise bad_field(KEY, f"is {kind(value)}, expected an object", _FIX)
    variables: dict[str, Any] = _without_nulls(value)
    for name in variables:
        if name in RESERVED_VARIABLES:
            what = "is no variable of a template: the row or the run says it itself"
            fix = "leave it out; messages and tools are keys of the row"
            raise bad_field(f"{KEY}.{name}", what, fix)
    if CLOCK in variables and not is_date(variables[CLOCK]):
        what = f"is {variables[CLOCK]!r}, must be the date that is written as today's"
        raise bad_field(f"{KEY}.{CLOCK}", what, 'write it as "2026-07-26"')
    return variables


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value
