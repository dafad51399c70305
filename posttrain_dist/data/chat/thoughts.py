"""The thoughts of an assistant: beside its words, or inside of them behind a tag."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from posttrain_dist.data import Thinking
from posttrain_dist.data.chat.rendering.jinja_environment import THOUGHTS
from posttrain_dist.flow import Message

# Tags of thoughts in what an assistant says: <think>, <thought>, <seed:think>, [THINK], ◁think▷.
_NAME = r"[\w:]*(?:think|thought|reason)\w*"
_OPEN, _CLOSE = r"\[THINK\]|◁think▷|<\|START_THINKING\|>", r"\[/THINK\]|◁/think▷|<\|END_THINKING\|>"
OPENING = re.compile(rf"<{_NAME}>|{_OPEN}")
CLOSING = re.compile(rf"</{_NAME}>|{_CLOSE}")
_INSIDE = re.compile(
    rf"\s*(?:<(?P<name>{_NAME})>|{_OPEN})(?P<words>.*?)(?:</(?P=name)>|{_CLOSE})\s*", re.DOTALL
)


class Thoughts(NamedTuple):
    """The thoughts of a turn, and its message without them."""

    words: str  # empty: there are none
    bare: Message
    written: str = ""  # as they stand in the content, with their tags and the space behind


def split_thoughts(message: Message) -> Thoughts:
    """A message of the assistant, and its thoughts apart."""
    bare = {key: value for key, value in message.items() if key not in THOUGHTS}
    beside = next((str(message[key]) for key in THOUGHTS if message.get(key)), "")
    content = message.get("content")
    inside = _INSIDE.match(content) if isinstance(content, str) else None
    if beside or not inside:
        return Thoughts(beside if beside.strip() else "", bare)
    assert isinstance(content, str)
    bare["content"] = content[inside.end() :]
    words = inside["words"]
    return Thoughts(words if words.strip() else "", bare, inside[0].lstrip())


def chosen_thoughts(messages: Sequence[Message], thinking: Thinking) -> list[Message]:
    """Messages with those thoughts that `template.thinking` leaves."""
    if thinking in (Thinking.keep, Thinking.close):
        return list(messages)
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    kept = turns[-1:] if thinking is Thinking.last else []
    return [
        split_thoughts(message).bare if i in turns and i not in kept else message
        for i, message in enumerate(messages)
    ]
