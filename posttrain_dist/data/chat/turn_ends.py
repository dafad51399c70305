"""Where a turn ends: the special tokens that close it, apart from what opens the next one."""

from __future__ import annotations

import re

from posttrain_dist.data.chat.controls import Span
from posttrain_dist.data.chat.conversation import ADD_MARKS, Conversation
from posttrain_dist.errors import DataError

_SPACE = re.compile(r"\s*")


def ends_turn(conversation: Conversation, span: Span) -> bool:
    """Whether the last thing in the span is a special token, and none of a thought."""
    text = conversation.text[span[0] : span[1]]
    closers = conversation.controls.closers
    return text.endswith(closers) or text.rstrip().endswith(closers)


def stops_early(conversation: Conversation, turn: int, span: Span) -> bool:
    """Whether a closing token of the turn stands directly behind the one that ends the span."""
    text, end = conversation.text, span[1]
    while text[end - 1].isspace():
        end -= 1
    behind = end + _num_spaces(text, end)
    if end == len(text) or not conversation.controls.closing.match(text, behind):
        return False
    upto = conversation.upto(turn)
    return upto[:end] == text[:end] and _behind_all(conversation, upto, end) > span[1]


def end_of_turn(conversation: Conversation, turn: int, first: int | None = None) -> int:
    """End of the turn in `conversation.upto(turn)`: behind the special token that closes it.

    Of a template without an end token, only its separator shows where the turn ends.

    Args:
        first: where what the assistant says begins; null: behind the inference prompt.

    Raises:
        DataError: that cannot be proved for this row.
    """
    upto = conversation.upto(turn)
    first = len(conversation.prompt(turn)) if first is None else first
    last = _own_end(conversation, upto)
    found = [m.span() for m in conversation.controls.closing.finditer(upto, first, last)]
    if not found:
        return last
    is_last = not upto[found[-1][1] : last].strip()
    probes = conversation.template.probes
    if probes.missing_end(bool(conversation.messages[turn].get("tool_calls"))):
        return last  # put there by `Conversation`
    if conversation.messages[turn].get("tool_calls"):  # may be full of special tokens
        return found[-1][1] if is_last else last
    if is_last and len(found) == 1 and (conversation.has_output(turn) or probes.generation_prompt):
        return found[0][1]  # no content can stand behind it, and no header behind the prompt
    # The header, or a thought, has some too, or may quote the content.
    content_end = _content_end(conversation, turn)
    end = next((end for start, end in found if start >= content_end), 0)
    return _behind_all(conversation, upto, end) if end else last


def widen(conversation: Conversation, turn: int, end: int) -> int:
    """`end` moved behind the special tokens that end the message.

    Which they are shows where the conversation ends with this message: behind an inner one
    stands what opens the next.
    """
    text, closing = conversation.text, conversation.controls.closing
    at = end + _num_spaces(text, end)
    token = closing.match(text, at)
    if not token:
        return end
    try:
        alone = conversation.upto(turn)
    except DataError:  # no conversation of its own: the end token belongs to a later message
        return end
    # Its own turn may be rendered otherwise when it is the last; how it ends is the same.
    if text.startswith(alone[: token.end()]) and len(alone) >= token.end():
        return _behind_all(conversation, alone, token.end())
    ends = _last_tokens(conversation, alone)
    return next((at + len(e) for e in ends if text.startswith(e, at)), end)


def _own_end(conversation: Conversation, upto: str) -> int:
    """Where `upto` ends without what the template adds to each conversation."""
    trailer = conversation.template.probes.trailer
    return len(upto) - len(trailer) if trailer and upto.endswith(trailer) else len(upto)


def _behind_all(conversation: Conversation, upto: str, end: int) -> int:
    """`end`, behind a closing token, moved behind those of the same turn that follow it.

    They stand in the text and in `upto`, where the turn is the last. White space may stand
    before the end token of the tokenizer only: another may open the next turn.
    """
    text, controls, last = conversation.text, conversation.controls, -1
    while True:
        num_spaces = _num_spaces(text, end)
        token = controls.closing.match(text, end + num_spaces)
        if not token or (num_spaces and token[0] != controls.eos):
            return end
        last = _own_end(conversation, upto) if last < 0 else last
        if token.end() > last or upto[end : token.end()] != text[end : token.end()]:
            return end
        end = token.end()


def _content_end(conversation: Conversation, turn: int) -> int:
    """Where the content of a turn ends in `upto(turn)`: proved by a sentinel that is put there."""
    sentinel, _ = conversation.sentinels()
    message = conversation.messages[turn]
    content = message.get("content") or ""
    bare = content.rstrip()
    signed = {**message, "content": bare + sentinel + content[len(bare) :]}
    messages = [*conversation.messages[:turn], signed]
    twin = conversation.twin(messages)
    if twin.count(sentinel) != 1 or twin.replace(sentinel, "") != conversation.upto(turn):
        raise DataError(
            f"where messages[{turn}] ends in the text of the chat template cannot be proved",
            where=conversation.where,
            fix=f"{ADD_MARKS}, or set its weight to 0",
        )
    return twin.index(sentinel)


def _num_spaces(text: str, at: int) -> int:
    """How much white space stands at `at` in the text."""
    if not text[at : at + 1].isspace():
        return 0
    found = _SPACE.match(text, at)
    return found.end() - at if found else 0


def _last_tokens(conversation: Conversation, upto: str) -> list[str]:
    """The run of closing tokens at the end of `upto`, and how it ends, longest first."""
    upto = upto[: _own_end(conversation, upto)].rstrip()
    ends: list[str] = []
    at = len(upto)
    found = [m.span() for m in conversation.controls.closing.finditer(upto)]
    for start, end in reversed(found):
        if end != at:
            break
        ends.insert(0, upto[start:])
        at = start
    return ends
