"""Where the turns of a conversation stand in its text: by the template's marks, or by prefixes."""

from __future__ import annotations

from collections.abc import Collection

from posttrain_dist.data.chat.controls import Span
from posttrain_dist.data.chat.conversation import ADD_MARKS, OTHER_PROMPT, Conversation
from posttrain_dist.data.chat.turn_ends import end_of_turn, ends_turn, widen
from posttrain_dist.data.prefix import common_prefix_length
from posttrain_dist.errors import DataError


def turn_spans(
    conversation: Conversation, wanted: Collection[int] | None = None
) -> dict[int, list[Span]]:
    """Assistant message -> where in the text it stands, with its end-of-turn token.

    Args:
        wanted: messages to find; null: all of the assistant.

    Raises:
        DataError: that cannot be proved for this row.
    """
    turns = [i for i, m in enumerate(conversation.messages) if m["role"] == "assistant"]
    chosen = turns if wanted is None else [turn for turn in turns if turn in wanted]
    if conversation.by_marks:
        found = _marked_spans(conversation, turns, chosen)
    else:
        found = _prefix_spans(conversation, chosen)
    return {turn: _ended(conversation, spans) for turn, spans in found.items()}


def _ended(conversation: Conversation, spans: list[Span]) -> list[Span]:
    """Spans without what stands behind the token that ends their turn: a model stops there."""
    spans = [span for span in spans if span[0] < span[1]]
    if spans and ends_turn(conversation, spans[-1]):
        start, end = spans[-1]
        spans[-1] = start, start + len(conversation.text[start:end].rstrip())
    return spans


def content_span(conversation: Conversation, index: int) -> list[Span]:
    """Where the content of any message stands, with the special token that ends it.

    Raises:
        DataError: that cannot be proved for this row.
    """
    place = content_place(conversation, index)
    return [(place[0], widen(conversation, index, place[1]))] if place else []


def content_place(conversation: Conversation, index: int) -> Span | None:
    """Where the content of any message stands, white space around it apart; null: it has none.

    The message is rendered a second time between two sentinels; it stands where they are, if
    the text is the same without them.

    Raises:
        DataError: that cannot be proved for this row.
    """
    content = conversation.messages[index].get("content")
    if not isinstance(content, str) or not content.strip():
        return None
    left, right = conversation.sentinels()
    bare = content.strip()
    signed = content.replace(bare, left + bare + right, 1)
    messages = [*conversation.messages]
    messages[index] = {**conversation.messages[index], "content": signed}
    twin = conversation.twin(messages)
    start, end = twin.find(left), twin.find(right) - 1
    if start < 0:
        raise DataError(
            f"the chat template does not write messages[{index}].content",
            where=conversation.where,
            fix="choose a template that writes the turns of this role "
            "(template=<one of docs/templates.md>)",
        )
    once = twin.count(left) == twin.count(right) == 1 and start < end
    if not once or twin.replace(left, "").replace(right, "") != conversation.text:
        raise DataError(
            f"the chat template changes messages[{index}].content, so its place in the text "
            "cannot be proved",
            where=conversation.where,
            fix="set template.supervise=assistant, and no weight on messages of other roles",
        )
    return start, end


# ------------------------------------------------------------------------------- by marks


def _marked_spans(
    conversation: Conversation, turns: list[int], chosen: list[int]
) -> dict[int, list[Span]]:
    """By the template's own marks.

    Marks around the content alone are widened by the end-of-turn token behind it. In a turn
    without output, what a mark ends in may be a token of the header.
    """
    spans: dict[int, list[Span]] = {turn: [] for turn in chosen}
    marks, places = conversation.marks, {turn: i for i, turn in enumerate(turns)}
    if len(turns) == len(marks) and all(_has_one(conversation, t, places[t]) for t in chosen):
        spans = {turn: [marks[places[turn]]] for turn in chosen}
    else:
        for span in marks:
            owner = _owner(conversation, turns, span)
            if owner in spans:
                spans[owner].append(span)
    for turn, found in spans.items():
        is_whole = found and ends_turn(conversation, found[-1]) and conversation.has_output(turn)
        if found and not is_whole:
            found[-1] = (found[-1][0], widen(conversation, turn, found[-1][1]))
        if found and found[0][0] < len(conversation.prompt(turn)):
            spans[turn] = _without_header(conversation, turn, found)
    return spans


def _without_header(conversation: Conversation, turn: int, spans: list[Span]) -> list[Span]:
    """Spans of a turn without what its inference prompt gives.

    A mark may also hold the header, if that is all it holds and its end is the turn's: where a
    mark stands in a macro, both its ends are wrong.
    """
    text, prompt, start = conversation.text, conversation.prompt(turn), spans[0][0]
    given = len(prompt)
    if not text.startswith(prompt):
        given = common_prefix_length(prompt, text)
        if not conversation.controls.closing.search(text, start, given):
            return spans
    cut = [(max(a, given), b) for a, b in spans if b > given]
    is_own = cut and _adds_header(conversation, turn, start) and ends_turn(conversation, cut[-1])
    if text[start:given].strip() and not is_own:
        conversation.early[turn] = start
    return cut


def _adds_header(conversation: Conversation, turn: int, start: int) -> bool:
    """Whether all of the prompt behind `start` is there for the sake of this turn."""
    try:
        before = conversation.upto(turn - 1)
    except DataError:
        return False
    return start >= len(before) and conversation.prompt(turn).startswith(before)


def _has_one(conversation: Conversation, turn: int, place: int) -> bool:
    """Whether of all marks that at `place` alone ends in what the turn adds to the text."""
    marks = conversation.marks
    first, last = len(conversation.prompt(turn)), len(conversation.upto(turn))
    if not first <= marks[place][1] <= last or (place and marks[place - 1][1] >= first):
        return False
    return place + 1 == len(marks) or marks[place + 1][1] > last


def _owner(conversation: Conversation, turns: list[int], span: Span) -> int:
    """The turn that a mark belongs to: a template may mark a turn twice, or not at all."""
    begun = [t for t in turns if conversation.text[: span[0]].startswith(conversation.prompt(t))]
    if begun:
        turn = begun[-1]
        if len(conversation.prompt(turn)) <= span[1] <= len(conversation.upto(turn)):
            return turn
    raise DataError(
        f"the chat template marks {len(conversation.marks)} stretches of text for {len(turns)} "
        "assistant turns, and which is whose cannot be proved",
        where=conversation.where,
        fix=f"{ADD_MARKS}; or set template.form=turns",
    )


# ---------------------------------------------------------------------------- by prefixes


def _prefix_spans(conversation: Conversation, chosen: list[int]) -> dict[int, list[Span]]:
    """By rendering every prefix: a turn is what it adds behind the generation prompt."""
    spans = {}
    for turn in chosen:
        prompt, upto = conversation.prompt(turn), conversation.upto(turn)
        if not upto.startswith(prompt):
            raise DataError(
                conversation.prompt_mismatch(turn, upto), where=conversation.where, fix=OTHER_PROMPT
            )
        end = end_of_turn(conversation, turn)
        if not conversation.text.startswith(upto[:end]):
            raise DataError(
                "the chat template renders earlier turns differently once later ones follow "
                f"(seen at messages[{turn}]), so the assistant's text cannot be separated from "
                "the rest",
                where=conversation.where,
                fix=f"{ADD_MARKS}; or set template.form=turns",
            )
        spans[turn] = [(len(prompt), end)]
    return spans
