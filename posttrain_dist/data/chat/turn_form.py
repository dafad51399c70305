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
from posttrain_dist.data.chat.rendering.template_probes import usual_thoughts
from posttrain_dist.data.chat.thoughts import Thoughts, split_thoughts
from posttrain_dist.data.chat.turn_ends import end_of_turn
from posttrain_dist.data.chat.turn_spans import content_place
from posttrain_dist.data.prefix import common_prefix_length
from posttrain_dist.errors import DataError

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
    probes = conversation.template.probes
    open_tag = probes.opens_thoughts(prompt)
    form = probes.thought_form or (usual_thoughts(open_tag) if open_tag else None)
    if form is None:  # the template writes each content as it is
        thoughts = Thoughts("", conversation.messages[turn])
    messages = [*conversation.messages[:turn], thoughts.bare]
    bare = Conversation(
        conversation.template, messages, conversation.where, conversation.tools, by_marks=False
    )
    place = content_place(bare, turn)
    start = place[0] if place else _begin_of_calls(bare, prompt)
    words = bare.text[start : end_of_turn(bare, turn, start)]
    if form is None or not (thoughts.words or open_tag):
        return _lead(bare.text[:start], prompt) + words
    if thoughts.written.startswith(form.open_tag):
        block = thoughts.written
    else:
        block = form.before + thoughts.words.strip("\n") + form.between
    if open_tag:
        given = prompt[len(prompt.rstrip()) :]
        block = block.removeprefix(form.open_tag)
        block = block.removeprefix(given) if block.startswith(given) else block.lstrip()
    return block + words


def _begin_of_calls(bare: Conversation, prompt: str) -> int:
    """Where a turn without content begins: behind its header, and an empty block of thoughts.

    Raises:
        DataError: that cannot be proved.
    """
    text, header = bare.text, bare.template.probes.generation_prompt.rstrip()
    same = common_prefix_length(prompt, text)
    if same < len(prompt.rstrip()) - len(header):  # they differ before the header already
        at = text.rfind(header) if bare.controls.closing.search(header) else -1
        if at < 0:
            raise DataError(
                f"where messages[{len(bare.messages) - 1}] begins in the text of the chat template "
                "cannot be proved",
                where=bare.where,
                fix="set its weight to 0, or choose another template",
            )
        same = at + len(header)
    half = _HALF_TAG.search(text, 0, same)
    if half and same < len(prompt):
        same = half.start()
    empty = bare.template.probes.empty_thoughts.match(text, same)
    at = empty.end() if empty else same
    return at + len(text[at:]) - len(text[at:].lstrip())


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
