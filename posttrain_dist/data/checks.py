"""What is checked on every sample: each a small function, and one table that explains them.

A check says what is wrong, or nothing. `strict` turns a failed check of level "error" into a
refusal of the row; else its name is noted in the sample's `faults`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from posttrain_dist.data.controls import Span
from posttrain_dist.data.conversation import Conversation


@dataclass(frozen=True, slots=True)
class Check:
    """What a check protects from, and how to mend what fails it."""

    level: str  # "error" or "warning"
    explain: str
    fix: str
    allowed: float = 0.0  # share of the rows that may fail without an alarm


CHECKS: dict[str, Check] = {
    "prompt_prefix": Check(
        "error",
        "Training must show the text that inference shows: the tokens of each inference prompt "
        "begin the training tokens, and a turn reads as it did when it was written.",
        "set template.explode_turns=true (one sample for each assistant turn) where the template "
        "rewrites earlier turns; else move spaces or line breaks from the end of the prompt "
        "to the beginning of the answer, or mend the template",
    ),
    "generation_prompt": Check(
        "error",
        "What stands between the generation prompt and the supervised text is given by nobody "
        "at inference, and the model never learned to write it.",
        "let the template write all of the header under add_generation_prompt, or move "
        "{% generation %} to the end of that prompt",
    ),
    "double_bos": Check(
        "error",
        "A second begin-of-text token is text that the model has never seen before.",
        "remove the one in the row, or one of those that the chat template writes",
    ),
    "end_of_turn": Check(
        "error",
        "A model that is not taught the end-of-turn token never stops.",
        "end each turn with a special token inside {% generation %} ... {% endgeneration %}; "
        "where rows are cut, raise data.max_length",
        allowed=0.01,
    ),
    "no_target": Check(
        "error",
        "A row without a supervised token teaches nothing.",
        "give the assistant something to say; if every row says this, the chat "
        "template's {% generation %} marks are misplaced",
    ),
    "truncated_target": Check(
        "warning",
        "The row was cut before its first supervised token, so it is left out.",
        "raise data.max_length, or set data.long_rows=split or drop",
    ),
    "control_tokens": Check(
        "warning",
        "The content quotes control tokens of the template; they are encoded as plain text, so "
        "that no content can forge a turn.",
        "nothing is to be done where the text means to quote them; else clean the data",
    ),
}


def prompt_text_fault(rendered: Conversation, turn: int, spans: Sequence[Span]) -> str:
    """A turn whose inference prompt, or whose own text, is not that of the training text."""
    if not rendered.text.startswith(rendered.prompt(turn)):
        return f"the inference prompt of messages[{turn}] does not begin the training text"
    end = spans[-1][1] if spans else len(rendered.prompt(turn))
    if rendered.upto(turn)[:end] != rendered.text[:end]:
        return (
            f"messages[{turn}] is rendered differently once later messages follow, so training "
            "would show it as inference never writes it"
        )
    return ""


def prompt_token_fault(ids: Sequence[int], first: int, tail: Sequence[int], turn: str) -> str:
    """An inference prompt whose last tokens, from token `first` on, are not in `ids`."""
    if list(ids[first : first + len(tail)]) == list(tail):
        return ""
    return (
        f"the tokens of the inference prompt{turn} do not begin the training tokens: the answer's "
        "first characters merge with the prompt's last"
    )


def gap_fault(rendered: Conversation, turn: int, spans: Sequence[Span]) -> str:
    """Text between the generation prompt and what is supervised of the turn."""
    prompt = rendered.prompt(turn)
    gap = rendered.text[len(prompt) : spans[0][0]].strip() if spans else ""
    if not gap or not rendered.text.startswith(prompt):
        return ""
    return f"the generation prompt of messages[{turn}] stops before {gap!r}"


def end_fault(rendered: Conversation, turn: int, spans: Sequence[Span]) -> str:
    """A turn whose last supervised character is not that of a special token."""
    if not spans or rendered.ends_turn(spans[-1]):
        return ""
    return f"no end-of-turn token is supervised in messages[{turn}]"


def bos_fault(ids: Sequence[int], bos: int | None, eos: int | None, name: str) -> str:
    """A begin-of-text token that stands neither first nor behind the end of a text."""
    if bos is None or bos == eos or list(ids).count(bos) < 2:
        return ""
    if ids[0] == ids[1] == bos:
        return f"begins with two {name} tokens"
    wrong = [i for i in range(1, len(ids)) if ids[i] == bos and ids[i - 1] != eos]
    return f"holds a second {name} token, as its token {wrong[0]}" if wrong else ""


def unseen_fault(rendered: Conversation, plain: str) -> str:
    """Tools or tool calls that the template does not write; `plain` is the text without tools."""
    if rendered.tools and plain == rendered.text:
        return "the chat template does not show the row's tools"
    for i, message in enumerate(rendered.messages):
        calls: Sequence[Any] = message.get("tool_calls") or ()
        names = [call.get("function", call).get("name") for call in calls]
        if any(isinstance(name, str) and name not in rendered.text for name in names):
            return f"the chat template does not show messages[{i}].tool_calls"
    return ""
