"""What is checked on every sample: each a small function, and one table that explains them.

A check says what is wrong, or nothing. `strict` turns a failed check of level "error" into a
refusal of the row; else its name is noted in the sample's `faults`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np

from posttrain_dist.data.chat.controls import REASONING, Span
from posttrain_dist.data.chat.conversation import Conversation
from posttrain_dist.data.chat.rendering.chat_template import WITH_TOOLS
from posttrain_dist.data.chat.thoughts import split_thoughts
from posttrain_dist.data.chat.turn_ends import ends_turn, stops_early
from posttrain_dist.data.tokens.text_tokens import Ints
from posttrain_dist.errors import DataError


@dataclass(frozen=True, slots=True)
class Check:
    """What a check protects from, and how to fix what fails it."""

    level: str  # "error" or "warning"
    explain: str
    fix: str
    allowed: float = 0.0  # share of the rows that may fail without an alarm
    refused_if_all: bool = False  # a warning, but no row that passes is no accident


CHECKS: dict[str, Check] = {
    "prompt_prefix": Check(
        "error",
        "Training must show the text that inference shows: the tokens of each inference prompt "
        "begin the training tokens, and a turn reads as it did when it was written.",
        "set template.form=turns (one sample for each assistant turn) where the template "
        "rewrites earlier turns; else move spaces or line breaks from the end of the prompt "
        "to the beginning of the answer, or correct the template",
    ),
    "open_thinking": Check(
        "error",
        "The inference prompt opens a block of thoughts, and the turn has none: a model that is "
        "trained to answer inside of it would be served with its answers taken for thoughts.",
        "set template.thinking=close (the block is closed empty, and the model learns to close "
        "it), or give the answers thoughts (reasoning_content)",
    ),
    "closed_thinking": Check(
        "error",
        "The inference prompt closes the block of thoughts before the turn, and the turn has "
        "some: it would be trained to think where thinking is switched off.",
        "set template.variables so that the template lets the model think; or "
        "template.thinking=none, which leaves thoughts out",
    ),
    "generation_prompt": Check(
        "error",
        "What stands between the generation prompt and the supervised text is given by nobody "
        "at inference, and the model is never trained to write it.",
        "let the template write all of the header under add_generation_prompt, or move "
        "{% generation %} to the end of that prompt",
    ),
    "generation_marks": Check(
        "error",
        "Of each turn in the loss, what stands between {% generation %} marks is trained on, and "
        "nothing that is given at inference: no header and no earlier message.",
        "begin {% generation %} where the generation prompt ends (not in a macro), in each branch "
        "that writes a turn of the assistant; or set the weight of the turn to 0",
    ),
    "content_shown": Check(
        "error",
        "What the assistant says, thinks and calls stands in the text; a template may leave out "
        "what it does not know, and the model would be trained on the rest.",
        "choose a template that writes it; or write thoughts into the content as "
        "<think>...</think> (template.thinking=none leaves them out), and what stands beside a "
        "tool call into a turn of its own; or take it out of the row",
    ),
    "tools_shown": Check(
        "error",
        "A model that is to call tools reads their description in the prompt, and each call stands "
        "in its own turn; a template may write neither.",
        WITH_TOOLS,
    ),
    "tools_listed": Check(
        "warning",
        "The row lists tools that nobody calls, and the chat template does not write them.",
        f"nothing is to be done where the answers do without tools; else {WITH_TOOLS}",
    ),
    "double_bos": Check(
        "error",
        "A second begin-of-text token is text that the model has never seen before.",
        "remove the one with which the row begins, or one of those that the chat template writes",
    ),
    "end_of_turn": Check(
        "error",
        "A model that is not taught the end-of-turn token never stops.",
        "end each turn with a special token inside {% generation %} ... {% endgeneration %}; "
        "where rows are cut, set data.long_rows=drop or split, or raise data.max_length",
        allowed=0.01,
    ),
    "no_target": Check(
        "error",
        "A row without a supervised token teaches nothing.",
        "give the assistant something to say, or its turns a weight; if every row says this, the "
        "chat template's {% generation %} marks are misplaced",
    ),
    "empty_thinking": Check(
        "warning",
        "The template begins an answer without thoughts with an empty block of them. The block is "
        "not supervised: the prompt gives it where thinking is switched off.",
        "serve with thinking switched off; or set template.thinking=close, so that the model "
        "learns to write the block itself",
    ),
    "assistant_first": Check(
        "warning",
        "The row begins with the assistant. No inference prompt leads to that turn, so it is not "
        "supervised.",
        'nothing is to be done where it is a greeting; "weight": 1 on the turn has it trained, if '
        "the template writes an inference prompt for it",
    ),
    "empty_turn": Check(
        "warning",
        "A turn of the assistant without a word and without a tool call teaches to end at once.",
        'leave such rows out, or give the turn "train": false; where every row says nothing, look '
        "at data.columns; a few are right where silence is the answer",
        refused_if_all=True,
    ),
    "truncated_target": Check(
        "warning",
        "The row was cut before its first supervised token, so it is left out.",
        "set data.long_rows=split (several samples of it) or drop, or raise data.max_length",
    ),
    "control_tokens": Check(
        "warning",
        "The content quotes control tokens of the template; they are encoded as plain text, so "
        "that no content can forge a turn. In a row of plain text they are what they say: it "
        "begins or ends in the middle.",
        "nothing is to be done where the text means to quote them; else clean the data",
    ),
}


class CheckFailed(DataError):
    """A row that fails a check of level "error"; `check` is its name."""

    def __init__(self, what: str, *, where: str = "", fix: str = "", check: str = "") -> None:
        super().__init__(what, where=where, fix=fix)
        self.check = check


@dataclass(slots=True)
class Faults:
    """The checks that one text fails, in the order in which they were made."""

    where: str
    strict: bool
    names: list[str] = field(default_factory=list)

    def note(self, name: str, what: str, fix: str = "") -> None:
        """Add a failed check, or refuse the row for it; an empty `what` is no fault.

        Args:
            name: of the check.
            fix: for this row; empty: that of the check.

        Raises:
            CheckFailed: the check is of level "error", and `strict` is set.
        """
        if not what:
            return
        check = CHECKS[name]
        if self.strict and check.level == "error":
            raise CheckFailed(what, where=self.where, fix=fix or check.fix, check=name)
        if name not in self.names:
            self.names.append(name)


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


def prompt_token_fault(ids_L: Ints, first: int, tail: Sequence[int], turn: str) -> str:
    """An inference prompt whose last tokens, from token `first` on, are not in `ids_L`."""
    if ids_L[first : first + len(tail)].tolist() == tail:
        return ""
    return (
        f"the tokens of the inference prompt{turn} do not begin the training tokens: the answer's "
        "first characters merge with the prompt's last"
    )


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
    holes = (rendered.text[a[1] : b[0]].strip() for a, b in pairwise(spans))
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


def bos_fault(
    ids_L: Ints,
    bos: int | None,
    eos: int | None,
    name: str,
    is_space: Callable[[int], bool] = lambda i: False,
) -> str:
    """A begin-of-text token that stands neither first nor behind the end of a text or turn.

    Args:
        is_space: whether token i is white space, which may stand between both.
    """
    if bos is None or bos == eos or np.count_nonzero(ids_L == bos) < 2:
        return ""
    ids = ids_L.tolist()
    if ids[0] == ids[1] == bos:
        return f"begins with two {name} tokens"
    wrong = []
    for i in (np.flatnonzero(ids_L[1:] == bos) + 1).tolist():
        before = i - 1
        while before > 0 and is_space(before):
            before -= 1
        if ids[before] != eos:
            wrong.append(i)
    return f"holds a second {name} token, as its token {wrong[0]}" if wrong else ""


def quote_fault(ids_L: Ints, bos: int | None, eos: int | None) -> str:
    """A row of plain text that holds a token which begins or ends one."""
    inside_L = ids_L[1:-1]
    is_quoted = any(token is not None and (inside_L == token).any() for token in (bos, eos))
    return "holds a begin or an end of text" if is_quoted else ""


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


# --------------------------------------------------------------------------- what is left out


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
    return "\n".join(_dense(part) for part in rendered.controls.closing.split(text))


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
    plain, escaped = _dense(text), _dense(json.dumps(text, ensure_ascii=False)[1:-1])
    if plain == escaped and text.isascii():
        return (plain,)
    return plain, escaped, _dense(json.dumps(text)[1:-1])


def _name(call: dict[str, Any]) -> str:
    return _dense(str(call.get("function", call).get("name")))


def _dense(text: str) -> str:
    return "".join(text.split())
