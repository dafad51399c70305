"""Cells of the Arrow type `arrow.json`, in columns of their own, in lists and in structs.

The package `datasets` writes them as Json(), where objects differ in their keys, or values in
their types; DuckDB writes them for its columns of JSON.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from posttrain_dist.data.read.bad_row import BadRow
from posttrain_dist.data.read.json_lines import load

# Fields that hold text, or a list of turns or of parts.
_TEXTS = frozenset(
    {
        *("content", "value", "text", "reasoning_content", "instruction", "input", "output"),
        *("system", "prompt", "completion", "chosen", "rejected"),
    }
)
_REWRITE = "write the column again: each of its cells is JSON"
_Read = Callable[[Any, str], Any]  # value, its path -> value


class JsonCell(NamedTuple):
    """The JSON text of a row's own cell; what it holds depends on our name for the column."""

    text: str | bytes

    def read(self, name: str) -> Any:
        """The value, under our name.

        Raises:
            BadRow: it is not valid JSON.
        """
        return _read_text(self.text, name, name)


def row_reader(schema: Any) -> Callable[[Any], Any] | None:
    """What reads the JSON in rows of this Arrow schema, in place; null: it has no such type.

    A row's own cells become a JsonCell. A row with JSON that is not valid becomes a BadRow, and
    one that is a BadRow already stays it.
    """
    readers: dict[str, _Read] = {}
    for field in schema:
        read: _Read | None = _wrap if _is_json(field) else _reader(field, field.name)
        if read is not None:
            readers[field.name] = read

    def read_row(row: Any) -> Any:
        try:
            return row if isinstance(row, BadRow) else _read_fields(row, readers, "")
        except BadRow as error:
            return error

    return read_row if readers else None


def _reader(field: Any, name: str) -> _Read | None:
    """What reads values of an Arrow field under the key `name`; null: nothing has to be done."""
    from pyarrow import types  # type: ignore[import-untyped]

    kind = field.type
    if _is_json(field):
        return lambda text, path: _read_text(text, name, path)
    if types.is_struct(kind):
        fields = (kind.field(i) for i in range(kind.num_fields))
        found = ((each.name, _reader(each, each.name)) for each in fields)
        readers = {key: read for key, read in found if read is not None}
        return (lambda value, path: _read_fields(value, readers, f"{path}.")) if readers else None
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return _list_reader(_reader(kind.value_field, name))
    return None


def _list_reader(item: _Read | None) -> _Read | None:
    def read(values: Any, path: str) -> Any:
        assert item is not None
        places = enumerate(values)
        return [None if v is None else item(v, f"{path}[{i}]") for i, v in places]

    return None if item is None else read


def _read_fields(value: dict[str, Any], readers: dict[str, _Read], path: str) -> dict[str, Any]:
    for key, read in readers.items():
        item = value.get(key)
        if item is not None and item is not math.nan:  # the null of an argument
            value[key] = read(item, f"{path}{key}")
    return value


def _wrap(text: Any, path: str) -> JsonCell:
    return JsonCell(text)


def _is_json(field: Any) -> bool:
    # Before pyarrow 19 the type is not known: its name is beside the bytes.
    beside = (field.metadata or {}).get(b"ARROW:extension:name")
    return getattr(field.type, "extension_name", None) == "arrow.json" or beside == b"arrow.json"


def _read_text(text: str | bytes, name: str, path: str) -> Any:
    """The value of a cell under the key `name`.

    `datasets` stores a text that happens to be valid JSON as it stands: `5` may have been "5".
    So where text belongs, whatever is neither text nor a list of objects is the text itself.
    """
    raw = text if isinstance(text, bytes) else text.encode()
    try:
        value = load(raw)
    except BadRow as error:
        if name in _TEXTS:
            return raw.decode(errors="replace")
        raise BadRow(f"{path} {error.what}", _REWRITE, field=path) from error
    if name not in _TEXTS or isinstance(value, str):
        return value
    is_objects = isinstance(value, list) and value and all(isinstance(v, dict) for v in value)
    return value if is_objects else raw.decode()
