"""Rows of a prompt and one answer, and of a prompt alone."""

from __future__ import annotations

import datetime
import decimal
from typing import Any

from posttrain_dist.data.formats.turns import Turns, read_text, read_turns, require_assistant
from posttrain_dist.data.read.bad_row import bad_field, kind
from posttrain_dist.flow import Message


def read_prompt_completion(row: dict[str, Any]) -> tuple[str, int] | Turns:
    """(text, characters of the prompt), or turns of which those of the prompt weigh nothing.

    Raises:
        BadRow: the two are not both text or both lists of turns, or there is no completion.
    """
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, str) and isinstance(completion, str):
        return prompt + read_text(completion, "completion", empty=False), len(prompt)
    for name, value, other in (("prompt", prompt, completion), ("completion", completion, prompt)):
        if not isinstance(value, str | list):
            fix = "write both as text, or both as lists of turns"
            raise bad_field(name, f"is {kind(value)}, expected {_expected(other)}", fix)
    if isinstance(prompt, str) or isinstance(completion, str):
        what = f"is {kind(completion)}, and prompt is {kind(prompt)}"
        raise bad_field("completion", what, "write both as text, or both as lists of turns")
    before, after = read_turns(prompt, "prompt"), read_turns(completion, "completion")
    require_assistant(after, "completion")
    weights = after.weights or (None,) * len(after.messages)
    messages = before.messages + after.messages
    return Turns(messages, (0.0,) * len(before.messages) + weights)


def _expected(other: Any) -> str:
    if isinstance(other, str):
        return "text"
    return "a list of turns" if isinstance(other, list) else "text or a list of turns"


def read_prompt(row: dict[str, Any]) -> tuple[Message, ...]:
    """The turns that an answer follows; text is one user turn.

    Raises:
        BadRow: it is neither, or it ends with an answer.
    """
    prompt = row["prompt"]
    if isinstance(prompt, str):
        return ({"role": "user", "content": read_text(prompt, "prompt", empty=False)},)
    turns = unweighted(read_turns(prompt, "prompt"), "prompt")
    if turns[-1]["role"] == "assistant":
        raise bad_field("prompt", "ends with an assistant turn", "end it with the user's turn")
    return turns


def unweighted(turns: Turns, path: str) -> tuple[Message, ...]:
    """The turns, of which none may have a weight.

    Raises:
        BadRow: one has.
    """
    if turns.weights:
        fix = "remove train and weight: answers are compared whole"
        raise bad_field(path, "has turns with train or weight", fix)
    return turns.messages


def read_reference(row: dict[str, Any], used: set[str]) -> dict[str, Any]:
    """The columns that a reward reads, as JSON can hold them.

    Raises:
        BadRow: one holds bytes.
    """
    return {name: _plain(value, name) for name, value in row.items() if name not in used}


def _plain(value: Any, path: str) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item, f"{path}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, f"{path}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, decimal.Decimal | datetime.timedelta):
        return str(value)
    if value != value:  # a null of a table
        return None
    if isinstance(value, bytes):
        raise bad_field(path, "holds bytes", "write it as text, or leave the column out")
    return value
