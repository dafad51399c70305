"""Nulls that Arrow adds to tools and to their calls: it gives each object the keys of all others.

Rows of JSON that were written from a table have them too. A null argument of a table comes as NaN.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from posttrain_dist.flow import Message

NULL_ARGUMENTS = "null_arguments"  # the check of a row that keeps one
# Of a JSON schema: what maps names to schemas, what holds values, and what may be null.
_BY_NAME = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_VALUES = ("default", "const", "enum", "examples")
_MAY_BE_NULL = ("default", "const")
_COMBINED = ("$ref", "allOf", "anyOf", "oneOf")


def clean_schema(schema: Any, *, by_name: bool = False) -> Any:
    """A description of a tool, or a JSON schema in it, without nulls that are no schema.

    Args:
        by_name: it maps names to schemas, of which none is ever null.
    """
    if isinstance(schema, list):
        return [clean_schema(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    kept: dict[str, Any] = {}
    for key, item in schema.items():
        if item is None and (by_name or key not in _MAY_BE_NULL):
            continue
        if by_name:
            kept[key] = clean_schema(item)
        else:
            kept[key] = item if key in _VALUES else clean_schema(item, by_name=key in _BY_NAME)
    return kept


def drop_foreign_arguments(
    messages: Sequence[Message], tools: Sequence[dict[str, Any]]
) -> tuple[tuple[Message, ...], bool]:
    """The turns without null arguments that are no parameter of the tool which is called.

    Args:
        messages: of one row, with `tool_calls` as they are read.
        tools: descriptions, already clean.

    Returns:
        The turns, and whether an argument of theirs is null by itself: that of a parameter, or
        of a tool that is not described.
    """
    if not any("tool_calls" in message for message in messages):
        return tuple(messages), False
    known = {tool["function"]["name"]: _parameters(tool["function"]) for tool in tools}
    kept, has_null = [], False
    for message in messages:
        if "tool_calls" in message:
            calls = []
            for call in message["tool_calls"]:
                function = call["function"]
                properties = known.get(function["name"])
                arguments, found = _own(function["arguments"], properties)
                has_null = has_null or found
                calls.append({**call, "function": {**function, "arguments": arguments}})
            message = {**message, "tool_calls": calls}
        kept.append(message)
    return tuple(kept), has_null


def _parameters(function: dict[str, Any]) -> dict[str, Any] | None:
    """Name -> schema of what a tool takes; null: that is not known."""
    schema = function.get("parameters", {})
    if not isinstance(schema, dict) or any(key in schema for key in _COMBINED):
        return None
    if isinstance(schema.get("properties"), dict):
        properties: dict[str, Any] = schema["properties"]
        return properties
    # Without `type: object` around them, as some data sets write parameters.
    return schema if all(isinstance(each, dict) for each in schema.values()) else {}


def _own(arguments: dict[str, Any], properties: dict[str, Any] | None) -> tuple[Any, bool]:
    """(the arguments without null ones of unknown names, whether another one is null)."""
    kept: dict[str, Any] = {}
    has_null = False
    for name, value in arguments.items():
        of_table = value != value  # where a null is an absent key
        known = not of_table if properties is None else name in properties
        value = None if of_table else value
        if value is None and not known:
            continue
        kept[name], found = _own_value(value, (properties or {}).get(name))
        has_null = has_null or found
    return kept, has_null


def _own_value(value: Any, schema: Any) -> tuple[Any, bool]:
    schema = schema if isinstance(schema, dict) else {}
    if isinstance(value, dict):
        properties = schema.get("properties")
        return _own(value, properties if isinstance(properties, dict) else None)
    if isinstance(value, list):
        inner = schema.get("items")
        items = [(v, False) if v is None else _own_value(v, inner) for v in value]
        return [item for item, _ in items], any(found for _, found in items)
    return value, value is None
