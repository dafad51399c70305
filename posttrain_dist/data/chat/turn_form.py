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

from posttrain_dist.data.chat.checks.shown import dense
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
    if upto.startswith(prompt) and dense(thoughts.words) in dense(upto[len(prompt) :]):
        return TurnText(upto[: end_of_turn(conversation, turn)], prompt)
    return TurnText(prompt + _said(conversation, turn, prompt, thoughts), prompt)


def _said(conversation: Conversation, turn: int, prompt: str, thoughts: Thoughts) -> str:
    probes = conversation.template.probes
    open_tag = probes.opens_thoughts(prompt)
    form = probes.thought_form or (usual_thoughts(open_tag) if open_tag else None)
    if form is None and not (probes.closes_thoughts(prompt) and not thoughts.words):
        # The template writes each content as it is.
        thoughts = Thoughts("", conversation.messages[turn])
    messages = [*conversation.messages[:turn], thoughts.bare]
    bare = Conversation(
        conversation.template, messages, conversation.where, conversation.tools, by_marks=False
    )
    start = _begin(bare, turn, prompt)
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


def _begin(bare: Conversation, turn: int, prompt: str) -> int:
    """Where the last turn begins, behind its header and an empty block of thoughts.

    Raises:
        DataError: that cannot be proved.
    """
    place, behind = content_place(bare, turn), _behind_header(bare.text, bare, prompt)
    if behind is not None and (place is None or bare.text[behind : place[0]].strip()):
        return behind  # a token of the turn's own stands before its content
    if place is not None:
        return place[0]
    header = bare.template.probes.generation_prompt.rstrip()
    shared = common_prefix_length(prompt, bare.text)
    if half := _HALF_TAG.search(bare.text, 0, shared):
        shared = half.start()
    if shared < len(prompt.rstrip()) - len(header):  # they differ before the header already
        at = bare.text.rfind(header) if bare.controls.closing.search(header) else -1
        if at < 0:
            raise DataError(
                f"where messages[{turn}] begins in the text of the chat template cannot be proved",
                where=bare.where,
                fix="set its weight to 0, or choose another template",
            )
        shared = at + len(header)
    words = bare.template.probes.header_words
    if words and bare.text.startswith(words, shared):  # the header of another role than asked for
        shared += len(words)
    return _behind_empty_thoughts(bare.text, bare, shared)


def _behind_header(text: str, bare: Conversation, prompt: str) -> int | None:
    """Where the header ends that a turn shares with its prompt; null: they differ before."""
    probes, head = bare.template.probes, prompt.rstrip()
    if open_tag := probes.opens_thoughts(prompt):
        head = head.removesuffix(open_tag)
    elif probes.closes_thoughts(prompt):
        blocks = [m.start() for m in probes.empty_thoughts.finditer(prompt)]
        head = prompt[: blocks[-1]] if blocks else prompt
    head = head.rstrip()
    return _behind_empty_thoughts(text, bare, len(head)) if text.startswith(head) else None


def _behind_empty_thoughts(text: str, bare: Conversation, at: int) -> int:
    empty = bare.template.probes.empty_thoughts.match(text, at)
    at = empty.end() if empty else at
    return at + len(text[at:]) - len(text[at:].lstrip())


def _lead(head: str, prompt: str) -> str:
    """White space before the content that the prompt does not give.

    Args:
        head: what the template writes before the content.
    """
    written, given = head[len(head.rstrip()) :], prompt[len(prompt.rstrip()) :]
    is_alike = head.rstrip()[-1:] == prompt.rstrip()[-1:]
    return written.removeprefix(given) if is_alike and written.startswith(given) else ""
