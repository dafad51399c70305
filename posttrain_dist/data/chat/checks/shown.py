"""What the template leaves out of what the assistant says, thinks and calls."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from posttrain_dist.data.chat.controls import REASONING, Span
from posttrain_dist.data.chat.conversation import Conversation


def unseen_fault(rendered: Conversation, plain: str, first: int = 0) -> str:
    """Tools, or calls in messages[first:], that the template does not write.

    `plain` is the text without tools.
    """
    if rendered.tools and plain == rendered.text:
        return "the chat template does not show the row's tools"
    for i, message in enumerate(rendered.messages[first:], first):
        calls = message.get("tool_calls")
        if not calls:
            continue
        shown = _dense_text(rendered, rendered.own_text(i))
        rest, _ = _unwritten(message, shown)
        if any(_name(call) in rest for call in calls):
            continue
        # What was taken for the content may be the call.
        if not any(_name(call) in shown for call in calls) or rendered.shows_content(i):
            return f"the chat template does not show messages[{i}].tool_calls"
    return ""


def shown_fault(rendered: Conversation, turn: int, spans: Sequence[Span]) -> str:
    """What the assistant says, thinks or calls and the template leaves out, white space apart."""
    if not spans:
        return ""
    message, (start, end) = rendered.messages[turn], (spans[0][0], spans[-1][1])
    calls = message.get("tool_calls") or ()
    content = str(message.get("content") or "").strip()
    # The usual case at once; a short content may stand in a header, or in an end token.
    is_shown = not content or (len(content) > 40 and rendered.text.find(content, start, end) >= 0)
    if is_shown and not calls and not message.get("reasoning_content"):
        return ""
    rest, field = _unwritten(message, _dense_text(rendered, rendered.text[start:end]))
    if field:
        return f"the chat template does not write all of messages[{turn}].{field}"
    at = 0
    for call in calls:
        name, arguments = _name(call), call.get("function", call).get("arguments")
        at = rest.find(name, at) + len(name)
        if at < len(name) or not all(any(f in rest for f in forms) for forms in _leaves(arguments)):
            field = "tool_calls" if not content or rendered.shows_content(turn) else "content"
            return f"the chat template does not write all of messages[{turn}].{field}"
    return ""


def _dense_text(rendered: Conversation, text: str) -> str:
    """Text without white space, and a line break for each of the template's own tokens."""
    return "\n".join(dense(part) for part in rendered.controls.closing.split(text))


def _unwritten(message: dict[str, Any], shown: str) -> tuple[str, str]:
    """`shown` without thoughts and content, and the field of the message that is not in it."""
    content, thought = (_words(message.get(k)) for k in ("content", "reasoning_content"))
    for order in (thought + content, content + thought) if thought else (content,):
        rest = _without(shown, order)
        if rest is not None:
            return rest, ""
    alone = _without(shown, content)
    return (shown, "content") if alone is None else (alone, "reasoning_content")


def _words(value: Any) -> list[str]:
    """Text between the marks of thoughts, which a template may write in its own way."""
    return [part for part in REASONING.split(value) if part.strip()] if value else []


def _without(shown: str, words: Sequence[str]) -> str | None:
    """`shown` without `words`, which stand in it one behind the other; null if they do not."""
    kept, at = [], 0
    for word in words:
        found = [(shown.find(form, at), len(form)) for form in _forms(word)]
        start, length = next((each for each in found if each[0] >= 0), (-1, 0))
        if start < 0:
            return None
        kept.append(shown[at:start])
        at = start + length
    return "\n".join([*kept, shown[at:]])


def _leaves(value: Any) -> Iterator[tuple[str, ...]]:
    """Each key and value of an argument, in the ways that templates write it."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield _forms(str(key))
            yield from _leaves(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _leaves(item)
    elif isinstance(value, float) and value.is_integer():
        yield json.dumps(value), str(int(value))
    elif value is not None:
        yield _forms(value) if isinstance(value, str) else (json.dumps(value), str(value))


def _forms(text: str) -> tuple[str, ...]:
    """Text as it is, and as JSON writes it."""
    plain, escaped = dense(text), dense(json.dumps(text, ensure_ascii=False)[1:-1])
    if plain == escaped and text.isascii():
        return (plain,)
    return plain, escaped, dense(json.dumps(text)[1:-1])


def _name(call: dict[str, Any]) -> str:
    return dense(str(call.get("function", call).get("name")))


def dense(text: str) -> str:
    """Text without white space."""
    return "".join(text.split())
