"""What can be wrong with a turn in the rendered text."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from posttrain_dist.data.chat.controls import Span
from posttrain_dist.data.chat.conversation import Conversation
from posttrain_dist.data.chat.thoughts import split_thoughts
from posttrain_dist.data.chat.turn_ends import ends_turn, stops_early


def prompt_text_fault(rendered: Conversation, turn: int, spans: Sequence[Span]) -> str:
    """A turn whose inference prompt, or whose own text, is not that of the training text."""
    if not rendered.text.startswith(rendered.prompt(turn)):
        return rendered.prompt_mismatch(turn, rendered.text)
    end = spans[-1][1] if spans else len(rendered.prompt(turn))
    if rendered.upto(turn)[:end] != rendered.text[:end]:
        return (
            f"messages[{turn}] is rendered differently once later messages follow, so training "
            "would show it as inference never writes it"
        )
    return ""


def open_thinking_fault(rendered: Conversation, turn: int) -> str:
    """A turn without thoughts whose inference prompt ends in an open block of them."""
    message = rendered.messages[turn]
    if not rendered.template.probes.opens_thoughts(rendered.prompt(turn)):
        return ""
    if split_thoughts(message).words:
        return ""
    return f"the inference prompt of messages[{turn}] opens its thoughts, and it has none"


def closed_thinking_fault(rendered: Conversation, turn: int) -> str:
    """A turn with thoughts whose inference prompt ends where thoughts are over."""
    if not rendered.template.probes.closes_thoughts(rendered.prompt(turn)):
        return ""
    if not split_thoughts(rendered.messages[turn]).words:
        return ""
    return f"the inference prompt of messages[{turn}] closes its thoughts, and it has some"


def gap_fault(rendered: Conversation, turn: int, spans: Sequence[Span]) -> str:
    """Text between the generation prompt and what is supervised of the turn."""
    prompt = rendered.prompt(turn)
    gap = rendered.text[len(prompt) : spans[0][0]].strip() if spans else ""
    if not gap or not rendered.text.startswith(prompt):
        return ""
    return f"the generation prompt of messages[{turn}] stops before {gap!r}"


def hole_fault(rendered: Conversation, turn: int, spans: Sequence[Span]) -> str:
    """Text inside of a turn that the template does not mark: its middle is never trained."""
    holes = (rendered.text[a[1] : b[0]] for a, b in pairwise(spans))
    hole = next(filter(None, holes), "")
    return f"the chat template does not mark {hole!r} inside of messages[{turn}]" if hole else ""


def end_fault(rendered: Conversation, turn: int, spans: Sequence[Span]) -> str:
    """A turn whose last supervised character is not that of a special token."""
    if not spans:
        return ""
    if ends_turn(rendered, spans[-1]):
        if not stops_early(rendered, turn, spans[-1]):
            return ""
        return f"not all of the tokens that end messages[{turn}] are supervised"
    return f"no end-of-turn token is supervised in messages[{turn}]"


def end_fix(rendered: Conversation) -> str:
    """What to do about a template that ends no turn; empty: the usual."""
    probes = rendered.template.probes
    mark = probes.next_mark
    if not mark and not probes.ends_turns:
        return (
            "the template ends no turn: set template.end_of_turn to the token that does, such as "
            f"{rendered.controls.eos!r}; it is then supervised behind each turn"
        )
    if not mark:
        return ""
    return (
        f"the next turn begins with {mark}: if the model stops there, set "
        f"template.end_of_turn='{mark}', else to the token that ends its turns"
    )


def mark_fault(rendered: Conversation, turn: int, spans: Sequence[Span]) -> str:
    """A turn of which nothing is supervised, or more than what follows its inference prompt."""
    if not spans:
        verb = "marks" if rendered.by_marks else "writes"
        return f"the chat template {verb} nothing of messages[{turn}], so it is not supervised"
    if turn not in rendered.early:
        return ""
    before = rendered.text[rendered.early[turn] : spans[0][0]].strip()
    return (
        f"what the chat template marks of messages[{turn}] begins before that turn, so "
        f"{before[:80]!r} would be supervised"
    )


def empty_fault(rendered: Conversation, turn: int) -> str:
    """A turn without words, thoughts and tool calls."""
    if rendered.has_output(turn) or rendered.messages[turn].get("reasoning_content"):
        return ""
    return f"messages[{turn}] says nothing"
