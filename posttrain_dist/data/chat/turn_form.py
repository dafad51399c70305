"""One turn as a sample of its own: its inference prompt, what the model then says, its end.

The prompt is what `add_generation_prompt=True` writes for the messages before the turn. What the
model says is what the template writes behind that prompt where the turn is the last message. Some
templates do not begin a turn as its prompt ends: they open a block of thoughts in the prompt only,
cut thoughts out of every turn, or write the system's words in prompts alone. Then it is put
together:

    thoughts, in the template's own form, as far as the prompt has not begun them
    content and tool calls, as the template writes them behind whichever header
    the tokens that end the turn
"""

from __future__ import annotations

import re
from typing import NamedTuple

from posttrain_dist.data.chat.conversation import Conversation
from posttrain_dist.data.chat.rendering.template_probes import ThoughtForm
from posttrain_dist.data.chat.thoughts import Thoughts, split_thoughts
from posttrain_dist.data.chat.turn_ends import end_of_turn
from posttrain_dist.data.chat.turn_spans import content_place
from posttrain_dist.data.prefix import common_prefix_length

_THINK = ThoughtForm("<think>", "<think>\n", "\n</think>\n\n", False)
_HALF_TAG = re.compile(r"[<\[◁][^<>\[\]◁▷\s]*\Z")


class TurnText(NamedTuple):
    """The text of one sample; what is said begins behind the prompt."""

    text: str
    prompt: str


def turn_text(conversation: Conversation) -> TurnText:
    """The last turn of a conversation, which is the assistant's.

    Raises:
        DataError: the template refuses the messages, or what it writes of the turn cannot be found.
    """
    turn = len(conversation.messages) - 1
    prompt, upto = conversation.prompt(turn), conversation.upto(turn)
    thoughts = split_thoughts(conversation.messages[turn])
    if upto.startswith(prompt) and _dense(thoughts.words) in _dense(upto[len(prompt) :]):
        return TurnText(upto[: end_of_turn(conversation, turn)], prompt)
    return TurnText(prompt + _said(conversation, turn, prompt, thoughts), prompt)


def _said(conversation: Conversation, turn: int, prompt: str, thoughts: Thoughts) -> str:
    messages = [*conversation.messages[:turn], thoughts.bare]
    bare = Conversation(
        conversation.template, messages, conversation.where, conversation.tools, by_marks=False
    )
    place = content_place(bare, turn)
    start = place[0] if place else _begin_of_calls(bare, prompt)
    words = bare.text[start : end_of_turn(bare, turn, start)]
    probes = conversation.template.probes
    is_open = probes.opens_thoughts(prompt)
    if not thoughts.words and not is_open:
        return _lead(bare.text[:start], prompt) + words
    form = probes.thought_form or _THINK
    if thoughts.written.startswith(form.open_tag):
        block = thoughts.written
    else:
        block = form.before + thoughts.words.strip("\n") + form.between
    if is_open:
        given = prompt[len(prompt.rstrip()) :]
        block = block.removeprefix(form.open_tag)
        block = block.removeprefix(given) if block.startswith(given) else block.lstrip()
    return block + words


def _begin_of_calls(bare: Conversation, prompt: str) -> int:
    """Where a turn without content begins: behind what its prompt shares, and empty thoughts."""
    same = common_prefix_length(prompt, bare.text)
    half = _HALF_TAG.search(bare.text, 0, same)
    if half and same < len(prompt):
        same = half.start()
    empty = bare.template.probes.empty_thoughts.match(bare.text, same)
    at = empty.end() if empty else same
    return at + len(bare.text[at:]) - len(bare.text[at:].lstrip())


def _lead(head: str, prompt: str) -> str:
    """White space before the content that the prompt does not give.

    Args:
        head: what the template writes before the content.
    """
    written, given = head[len(head.rstrip()) :], prompt[len(prompt.rstrip()) :]
    is_alike = head.rstrip()[-1:] == prompt.rstrip()[-1:]
    return written.removeprefix(given) if is_alike and written.startswith(given) else ""


def _dense(text: str) -> str:
    return "".join(text.split())
