"""Rows that hold one conversation: messages, ShareGPT, Alpaca. All become messages."""

from __future__ import annotations

import difflib
import functools
from typing import Any, NamedTuple

from posttrain_dist.data.formats.loss_weight import SPELLINGS, read_weight
from posttrain_dist.data.formats.nulls import clean_schema
from posttrain_dist.data.read.bad_row import BadRow, bad_field, kind
from posttrain_dist.data.read.json_lines import load
from posttrain_dist.flow import Message

ROLES = ("system", "user", "assistant", "tool")
_CALL = "function_call"  # a turn that is nothing but calls of tools
_ROLE_OF = {role: role for role in (*ROLES, _CALL)} | {
    "developer": "system",
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "function": "tool",
    "observation": "tool",
    "function_response": "tool",
    "tool_response": "tool",
    "tool_call": _CALL,
}
_BESIDE = ("tool_calls", "function_call", "tool_call_id", "name", "reasoning_content")
_THOUGHTS = ("reasoning_content", "reasoning", "thinking")  # the first one that is text counts
# Keys that would change what is trained; any other unknown key of a turn is the user's own note.
_NEVER = {
    *("image", "images", "video", "videos", "audio", "audios", "documents", "tools", "functions"),
    *("thought", "thoughts", *SPELLINGS),
}
TURN = '{"role": "user", "content": "..."}'
_AS_TEXT = "write it as a JSON string"
_PLAIN = {"role", "content"}


class Turns(NamedTuple):
    """A list of turns; `weights` is empty where no turn says its own."""

    messages: tuple[Message, ...]
    weights: tuple[float | None, ...]


def read_text(value: Any, path: str, *, empty: bool = True) -> str:
    """Text as it stands.

    Raises:
        BadRow: it is none, or it is empty and may not be.
    """
    if not isinstance(value, str):
        raise bad_field(path, f"is {kind(value)}, expected text", _AS_TEXT)
    if not value and not empty:
        fix = "remove the row; where every row says so, set data.columns to the key that holds it"
        raise bad_field(path, "is empty", fix)
    return value


def read_turns(value: Any, path: str) -> Turns:
    """A list of turns, with the keys of OpenAI (role, content) or ShareGPT (from, value).

    Raises:
        BadRow: a turn is not as it should be; `field` is its path.
    """
    if not isinstance(value, list) or not value:
        what = "an empty list" if value == [] else kind(value)
        raise bad_field(path, f"is {what}, expected a list of turns", f"write [{TURN}, ...]")
    messages: list[Message] = []
    weights: list[float | None] = []
    for i, turn in enumerate(value):
        message, weight = _read_turn(turn, path, i)
        messages.append(message)
        weights.append(weight)
    has_weights = any(weight is not None for weight in weights)
    return Turns(tuple(messages), tuple(weights) if has_weights else ())


def _read_turn(turn: Any, above: str, i: int) -> tuple[Message, float | None]:
    if isinstance(turn, dict) and turn.keys() == _PLAIN:  # most turns; the rest takes its time
        role, content = turn["role"], turn["content"]
        if role in ROLES and isinstance(content, str):
            return {"role": role, "content": content}, None
    path = f"{above}[{i}]"
    if not isinstance(turn, dict):
        raise bad_field(path, f"is {kind(turn)}, expected an object", f"write {TURN}")
    given = {key: item for key, item in turn.items() if item not in (None, "", [], {})}
    shares = "from" in turn and turn.get("role") is None
    names = ("from", "value") if shares else ("role", "content")
    if names[0] not in turn:
        raise bad_field(path, "has no key 'role'", f"write {TURN}")
    role = turn[names[0]]
    if not isinstance(role, str) or role not in _ROLE_OF:
        raise bad_field(f"{path}.{names[0]}", f"is {role!r}", f"use one of {', '.join(ROLES)}")
    role = _ROLE_OF[role]
    refused = _refused(tuple(given), names)
    if refused:
        raise bad_field(f"{path}.{refused[0]}", *refused[1:])
    if role == _CALL:
        calls = _calls_of_text(turn.get(names[1]), f"{path}.{names[1]}")
        message = {"role": "assistant", "content": "", "tool_calls": calls}
        return message, read_weight(turn, f"{path}.")
    message = _beside(given, role, path)
    message = {"role": role, "content": _content(turn, names[1], message, path), **message}
    return message, read_weight(turn, f"{path}.")


@functools.lru_cache(maxsize=4096)
def _refused(keys: tuple[str, ...], names: tuple[str, str]) -> tuple[str, str, str] | None:
    """(the first key that is no note, what is wrong with it, what to do)."""
    known = (*names, *_BESIDE, *_THOUGHTS, "train", "weight")
    for key in keys:
        if key in _NEVER:
            fix = f"remove it; what is read of a turn is {', '.join(known)}"
            return key, "is not supported", fix
        absent = [] if key in known else [name for name in known if name not in keys]
        near = difflib.get_close_matches(key, absent, n=1, cutoff=0.8)
        if near:
            return key, "is not a known key", f"write {near[0]!r}, or rename the key"
    return None


def _content(turn: dict[str, Any], key: str, beside: Message, path: str) -> str:
    value = turn.get(key)
    if value is None and "tool_calls" in beside:
        return ""
    if key not in turn:
        raise bad_field(path, f"has no key {key!r}", f"write {TURN}")
    path = f"{path}.{key}"
    if not isinstance(value, list):
        return read_text(value, path)
    return "".join(_part(part, f"{path}[{i}]") for i, part in enumerate(value))


def _part(part: Any, path: str) -> str:
    if isinstance(part, str):
        return part
    if not isinstance(part, dict):
        raise bad_field(path, f"is {kind(part)}, expected an object", '{"type": "text", ...}')
    if part.get("type", "text") != "text":
        fix = "only parts of text can be trained on: remove the row or the part"
        raise bad_field(f"{path}.type", f"is {part['type']!r}", fix)
    return read_text(part.get("text"), f"{path}.text")


def _beside(given: dict[str, Any], role: str, path: str) -> Message:
    """What the template reads beside role and content."""
    message: Message = {}
    if "function_call" in given:  # what tool_calls were called before
        given = {**given, "tool_calls": [given["function_call"]]}
    if "tool_calls" in given:
        if role != "assistant":
            fix = "tool_calls belong to assistant turns"
            raise bad_field(f"{path}.tool_calls", f"is not supported in a {role} turn", fix)
        message["tool_calls"] = _calls(given["tool_calls"], f"{path}.tool_calls")
    if "reasoning_content" in given and role != "assistant":
        fix = "reasoning_content belongs to assistant turns"
        raise bad_field(f"{path}.reasoning_content", f"is not supported in a {role} turn", fix)
    for key in ("tool_call_id", "name", "reasoning_content"):
        if key in given:
            message[key] = read_text(given[key], f"{path}.{key}")
    thoughts = (given[key] for key in _THOUGHTS if isinstance(given.get(key), str))
    if role == "assistant" and (thought := next(thoughts, None)):
        message["reasoning_content"] = thought
    return message


# ------------------------------------------------------------------------------------- tools


def _calls(value: Any, path: str) -> list[dict[str, Any]]:
    if not isinstance(value, list):
        raise bad_field(path, f"is {kind(value)}, expected a list", "write a list of calls")
    return [_call(item, f"{path}[{i}]") for i, item in enumerate(value)]


def _call(value: Any, path: str) -> dict[str, Any]:
    """{"type": "function", "function": {"name", "arguments": object}}, and its id if it has one."""
    fix = '{"type": "function", "function": {"name": "...", "arguments": {...}}}'
    if not isinstance(value, dict):
        raise bad_field(path, f"is {kind(value)}, expected an object", fix)
    if value.get("type", "function") != "function":
        raise bad_field(f"{path}.type", f"is {value['type']!r}", fix)
    function = value.get("function", value)
    path_of = f"{path}.function" if "function" in value else path
    if not isinstance(function, dict):
        raise bad_field(path_of, f"is {kind(function)}, expected an object", fix)
    name = read_text(function.get("name"), f"{path_of}.name", empty=False)
    arguments = function.get("arguments")
    call: dict[str, Any] = {"type": "function", "function": {"name": name, "arguments": {}}}
    if isinstance(arguments, str) and arguments.strip():
        arguments = _nested(arguments, f"{path_of}.arguments")
    if arguments not in (None, "") and not isinstance(arguments, dict):
        what = f"is {kind(arguments)}, expected an object"
        raise bad_field(f"{path_of}.arguments", what, fix)
    call["function"]["arguments"] = arguments or {}
    if value.get("id") is not None:
        call = {"id": read_text(value["id"], f"{path}.id"), **call}
    return call


def _calls_of_text(value: Any, path: str) -> list[dict[str, Any]]:
    calls = _nested(value, path) if isinstance(value, str) else value
    return _calls(calls if isinstance(calls, list) else [calls], path)


def read_tools(value: Any) -> tuple[dict[str, Any], ...]:
    """Descriptions of tools, a list or its JSON text; a bare function is wrapped as OpenAI's is.

    Nulls that are no JSON schema are dropped.

    Raises:
        BadRow: one has no name, or it is no list of objects.
    """
    fix = '[{"type": "function", "function": {"name": "...", "parameters": {...}}}]'
    if isinstance(value, str):
        value = _nested(value, "tools") if value.strip() else []
    if value is None:
        return ()
    if not isinstance(value, list):
        raise bad_field("tools", f"is {kind(value)}, expected a list", fix)
    tools = []
    for i, item in enumerate(value):
        tool = _nested(item, f"tools[{i}]") if isinstance(item, str) else item
        if not isinstance(tool, dict):
            raise bad_field(f"tools[{i}]", f"is {kind(tool)}, expected an object", fix)
        function = tool.get("function", tool)
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise bad_field(f"tools[{i}]", "has no function with a name", fix)
        tool = tool if "function" in tool else {"type": "function", "function": tool}
        tools.append(clean_schema(tool))
    return tuple(tools)


def _nested(text: str, path: str) -> Any:
    try:
        return load(text.encode())
    except BadRow as error:
        raise bad_field(path, error.what, "write a JSON object, or its text") from error


# ------------------------------------------------------------------------------------ the rows


def require_assistant(turns: Turns, path: str) -> None:
    """Refuse turns of which none is supervised.

    Raises:
        BadRow: no turn is an assistant's, and none has a weight of its own.
    """
    if not any(message["role"] == "assistant" for message in turns.messages) and not any(
        turns.weights
    ):
        raise bad_field(
            path,
            "has no assistant turn, so nothing of this row is supervised",
            'add {"role": "assistant", "content": "..."} or remove the row',
        )


def read_conversation(row: dict[str, Any], key: str) -> Turns:
    """The turns under `key`; ShareGPT may have the system text beside them.

    Raises:
        BadRow: they are not as they should be.
    """
    turns = read_turns(row[key], key)
    system = row.get("system") if key == "conversations" else None
    if system is not None and read_text(system, "system"):
        if turns.messages[0]["role"] == "system":
            raise bad_field("system", "stands beside a system turn", "keep one of them")
        weights = (None, *turns.weights) if turns.weights else ()
        turns = Turns(({"role": "system", "content": system}, *turns.messages), weights)
    require_assistant(turns, key)
    return turns


def read_alpaca(row: dict[str, Any]) -> Turns:
    """instruction, input and output, after `system` and the pairs of `history`.

    Raises:
        BadRow: one of them is not text, or instruction or output is empty.
    """
    messages: list[Message] = []

    def add(role: str, content: str) -> None:
        messages.append({"role": role, "content": content})

    if row.get("system") is not None and read_text(row["system"], "system"):
        add("system", row["system"])
    history = row.get("history")
    if history is not None and not isinstance(history, list):
        raise bad_field("history", f"is {kind(history)}, expected a list", '[["q", "a"], ...]')
    for i, pair in enumerate(history or []):
        path = f"history[{i}]"
        if not isinstance(pair, list) or len(pair) != 2:
            raise bad_field(path, "is no pair of question and answer", '[["q", "a"], ...]')
        add("user", read_text(pair[0], f"{path}[0]"))
        add("assistant", read_text(pair[1], f"{path}[1]"))
    question = read_text(row["instruction"], "instruction", empty=False)
    if row.get("input") is not None and read_text(row["input"], "input"):
        question += "\n" + row["input"]
    add("user", question)
    add("assistant", read_text(row["output"], "output", empty=False))
    return Turns(tuple(messages), ())
