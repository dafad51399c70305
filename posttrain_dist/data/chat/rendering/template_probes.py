"""What a chat template shows of itself when it renders small conversations.

Where a probe is refused, or shows nothing, the property says so by an empty value: what it would
prove is then not proved.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cached_property
from typing import NamedTuple, Protocol

import jinja2
from jinja2 import meta, nodes

from posttrain_dist.data.chat.controls import ControlTokens
from posttrain_dist.data.prefix import common_prefix_length
from posttrain_dist.errors import DataError
from posttrain_dist.flow import Message

_Q, _A, _R, _T, _S = "probe q", "probe a", "probe r", "probe t", "probe s"
_ASK, _SAY = {"role": "user", "content": _Q}, {"role": "assistant", "content": _A}
_AGAIN = {"role": "user", "content": _R}
_SYSTEM = {"role": "system", "content": _S}
_TAG = r"(?:<[^<>\s]+>|\[/?[A-Z_]+\]|◁[^◁▷\s]+▷)"
_OF_THOUGHTS = re.compile(r"think|thought|reason", re.IGNORECASE)
_CLOSES = re.compile(r"\W*/|\W*END", re.IGNORECASE)  # how a closing tag begins
_TAG_BEFORE = re.compile(rf"({_TAG})\s*\Z")
_TAG_BEHIND = re.compile(rf"\s*({_TAG})")
_THINK, _END_THINK = "<think>", "</think>"
# What transformers gives to every template, beside special tokens.
_GIVEN = {
    *("messages", "tools", "documents", "add_generation_prompt", "raise_exception"),
    *("strftime_now", "namespace", "range", "dict", "lipsum", "cycler", "joiner", "loop"),
    *("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"),
}


class ThoughtForm(NamedTuple):
    """How a template writes thoughts before an answer."""

    open_tag: str
    before: str  # from the tag, with it, to the thoughts
    between: str  # from the thoughts to the answer, with the closing tag


def _last_tag(prompt: str) -> str:
    """The tag of thoughts that a prompt ends with, white space apart."""
    found = _TAG_BEFORE.search(prompt, max(len(prompt) - 200, 0))
    return found[1] if found and _OF_THOUGHTS.search(found[1]) else ""


def usual_thoughts(open_tag: str = _THINK) -> ThoughtForm:
    """The form that most models write thoughts in: tags on lines of their own."""
    close_tag = open_tag[0] + "/" + open_tag[1:]
    return ThoughtForm(open_tag, f"{open_tag}\n", f"\n{close_tag}\n\n")


class Renders(Protocol):
    """A chat template, as far as probes need it."""

    source: str
    controls: ControlTokens
    bos: str
    end_tokens: tuple[str, ...]
    end_of_turn: str | None

    @property
    def environment(self) -> jinja2.Environment:
        """In which it is compiled."""

    def render(
        self, messages: list[Message], where: str, *, generation_prompt: bool = False
    ) -> str:
        """Text of a conversation."""


class TemplateProbes:
    """The probes of one template; each is made when it is asked for."""

    def __init__(self, template: Renders) -> None:
        self._template = template
        self._closing = template.controls.closing

    # ------------------------------------------------------------------------ around a turn

    @cached_property
    def trailer(self) -> str:
        """What stands behind the end of the last turn, and behind that of no inner one.

        Empty where the template refuses the probe, or where an inner turn has no end of its own.
        """
        for last, inner in self._last_and_inner([_ASK, _SAY]):
            shared = common_prefix_length(last, inner)
            content_end = last.rfind(_A) + len(_A)
            # Two different tokens may begin alike.
            tokens = self._token_spans(last, content_end)
            shared = next((a for a, b in tokens if a < shared < b), shared)
            is_closed = any(b <= shared for _, b in tokens)
            return last[shared:] if content_end <= shared and is_closed else ""
        return ""

    def missing_end(self, calls: bool) -> str:
        """The end of a turn that the template does not write behind the last one.

        It is what inner turns end with; else the mark of the next role, where the model's
        generation config, or `template.end_of_turn`, says that generation stops there; else
        `template.end_of_turn`.

        Args:
            calls: of a turn that calls tools.
        """
        return self._missing_of_calls if calls else self._missing_of_answers

    @cached_property
    def last_space(self) -> str:
        """The white space that the template writes behind a last answer which it does not end."""
        for last, _ in self._last_and_inner([_ASK, _SAY]):
            tail = last[last.rfind(_A) + len(_A) :].removesuffix(self.always_prompt)
            return tail if tail.isspace() else ""
        return ""

    @cached_property
    def next_mark(self) -> str:
        """The token that opens what follows an answer, of a template that ends none; else empty."""
        for last, inner in self._last_and_inner([_ASK, _SAY]):
            if not self._has_end(last, inner):
                return self._first_token(inner[inner.rfind(_A) + len(_A) : inner.rfind(_R)])
        return ""

    @cached_property
    def ends_turns(self) -> bool:
        """Whether a token stands behind an answer, the last or an inner one."""
        return any(self._has_end(*texts) for texts in self._last_and_inner([_ASK, _SAY]))

    @cached_property
    def own_end(self) -> str:
        """The token that the template writes behind a last answer; empty: none."""
        for last, _ in self._last_and_inner([_ASK, _SAY]):
            return self._first_token(last[last.rfind(_A) + len(_A) :])
        return ""

    def _has_end(self, last: str, inner: str) -> bool:
        tail = last[last.rfind(_A) + len(_A) :].removesuffix(self.always_prompt)
        return bool(self._closing.search(tail) or self._closing.search(self._inner_end(inner)))

    @cached_property
    def _missing_of_answers(self) -> str:
        for last, inner in self._last_and_inner([_ASK, _SAY]):
            tail = last[last.rfind(_A) + len(_A) :].removesuffix(self.always_prompt)
            if self._closing.search(tail):
                return ""
            end = self._inner_end(inner)
            return end.strip() if self._closing.search(end) else self._said_end(self.next_mark)
        return self._said_end("")

    @cached_property
    def _missing_of_calls(self) -> str:
        function = {"name": "probe", "arguments": {}}
        call = {"type": "function", "id": "a23456789", "function": function}
        turn: Message = {"role": "assistant", "content": "", "tool_calls": [call]}
        result = {"role": "tool", "content": _R, "tool_call_id": "a23456789"}
        last, inner = self._render([_ASK, turn]), self._render([_ASK, turn, result])
        follows = inner[len(last) : inner.rfind(_R)] if last and inner.startswith(last) else ""
        mark, ends = self._first_token(follows), self._template.end_tokens
        if not self._missing_of_answers:
            # The template ends answers; are calls ended by the mark of the tool alone?
            return mark if mark in ends and not last.rstrip().endswith(ends) else ""
        return self._said_end(mark) if follows else self._missing_of_answers

    def _said_end(self, mark: str) -> str:
        template = self._template
        return mark if mark and mark in template.end_tokens else template.end_of_turn or ""

    def _first_token(self, text: str) -> str:
        found = self._closing.match(text.lstrip())
        return found[0] if found else ""

    @cached_property
    def always_prompt(self) -> str:
        """The generation prompt of a template that writes it whether it is asked for or not."""
        for last, inner in self._last_and_inner([_ASK, _SAY]):
            if self._render([_ASK, _SAY], generation_prompt=True) != last:
                return ""
            tail, end = last[last.rfind(_A) + len(_A) :], self._inner_end(inner)
            if end and tail.startswith(end):
                return tail[len(end) :]
            # What also stands behind an inner answer is its end.
            shared = common_prefix_length(tail, inner[inner.rfind(_A) + len(_A) :])
            tokens = self._token_spans(tail)
            return tail[next((a for a, b in tokens if a < shared < b), shared) :]
        return ""

    @cached_property
    def generation_prompt(self) -> str:
        """How an inference prompt ends, from the header of the assistant on; empty: unknown."""
        if self.always_prompt:
            return self.always_prompt
        for first in ([], [_SYSTEM]):
            plain = self._render([*first, _ASK])
            asked = self._render([*first, _ASK], generation_prompt=True)
            if plain and asked.startswith(plain) and len(asked) > len(plain):
                return asked[len(plain) :]
            if asked:
                behind = asked[asked.rfind(_Q) + len(_Q) :]
                tokens = [m.start() for m in self._closing.finditer(behind)]
                return behind[tokens[-1] :] if tokens else behind.strip()
        return ""

    @cached_property
    def header_words(self) -> str:
        """What stands in plain text before an answer, behind the last token of its header."""
        for last, _ in self._last_and_inner([_ASK, _SAY]):
            at = last.rfind(_A)
            tokens = [end for _, end in self._token_spans(last[:at])]
            return last[tokens[-1] if tokens else last.find(_Q) + len(_Q) : at].strip()
        return ""

    def _inner_end(self, inner: str) -> str:
        """What ends an answer before the next question; empty where that cannot be told.

        Between both stand the end of the one and the header of the other. The header also stands
        before the first question, where no other message is before that, and may begin with the
        token with which a conversation begins.
        """
        at = inner.rfind(_A) + len(_A)
        between, first = inner[at : inner.rfind(_R)], inner[: inner.find(_Q)]
        cut = len(between) - common_prefix_length(between[::-1], first[::-1])
        # Two different tokens may end alike.
        cut = next((b for a, b in self._token_spans(between) if a < cut < b), cut)
        begins = [m[0] for m in self._closing.finditer(inner, 0, at) if m[0] != self._template.bos]
        by_token = between.rfind(begins[0]) if begins else -1
        end = max(cut, by_token)
        if end == len(between):
            return ""
        return between[:end].rstrip().removesuffix(self._template.bos)

    def _token_spans(self, text: str, at: int = 0) -> list[tuple[int, int]]:
        return [m.span() for m in self._closing.finditer(text, at)]

    def _last_and_inner(self, turns: list[Message]) -> Iterator[tuple[str, str]]:
        """A conversation that ends with an answer, and as it goes on; none where it is refused."""
        for first in ([], [_SYSTEM]):
            last = self._render([*first, *turns])
            inner = self._render([*first, *turns, _AGAIN])
            if _A in last and _A in inner and _R in inner:
                yield last, inner

    # ----------------------------------------------------------------------------- thoughts

    @cached_property
    def thought_form(self) -> ThoughtForm | None:
        """How thoughts are written between tags of their own; null: that is not known.

        A template that shows none, and takes out of an answer what stands there between the usual
        tags, is that of a model which writes these.
        """
        text = self._answer({**_SAY, "reasoning_content": _T})
        at, answer = text.rfind(_T), text.rfind(_A)
        opened = _TAG_BEFORE.search(text, 0, at) if 0 <= at < answer else None
        closed = _TAG_BEHIND.match(text, at + len(_T)) if opened else None
        if opened and closed and _OF_THOUGHTS.search(opened[1]):
            # Behind the closing tag, a token may stand that begins each answer.
            spaces = len(text[closed.end() : answer]) - len(text[closed.end() : answer].lstrip())
            between = text[at + len(_T) : closed.end() + spaces]
            return ThoughtForm(opened[1], text[opened.start() : at], between)
        inside = self._answer({**_SAY, "content": f"{_THINK}\n{_T}\n{_END_THINK}\n\n{_A}"})
        if _A in inside and _T not in inside:
            return usual_thoughts()
        return None

    def _answer(self, message: Message) -> str:
        return self._render([_ASK, message]) or self._render([_SYSTEM, _ASK, message])

    @cached_property
    def empty_thoughts(self) -> re.Pattern[str]:
        """A block of thoughts without any, with the white space around it; or its end alone."""
        blocks = {(_THINK, _END_THINK)}
        if self.thought_form is not None:
            blocks.add((self.thought_form.open_tag, self._close_tag))
        found = (f"(?:{re.escape(a)})?\\s*{re.escape(b)}" for a, b in sorted(blocks))
        return re.compile(rf"\s*(?:{'|'.join(found)})\s*")

    def opens_thoughts(self, prompt: str) -> str:
        """The tag with which an inference prompt ends in an open block of thoughts, or nothing."""
        tag = _last_tag(prompt)
        return "" if _CLOSES.match(tag) else tag

    def closes_thoughts(self, prompt: str) -> bool:
        """Whether an inference prompt ends where a block of thoughts is over."""
        if tag := _last_tag(prompt):
            return bool(_CLOSES.match(tag))
        form, header = self.thought_form, self.generation_prompt
        holds_block = form is not None and form.open_tag in header
        return prompt.endswith(header) and (
            holds_block or bool(_OF_THOUGHTS.search(self._only_prompted))
        )

    @cached_property
    def _only_prompted(self) -> str:
        """The end of an inference prompt that no turn is written with."""
        prompt, said = self._render([_ASK], generation_prompt=True), self._render([_ASK, _SAY])
        return prompt[common_prefix_length(prompt, said) :]

    @property
    def _close_tag(self) -> str:
        closed = _TAG_BEHIND.match(self.thought_form.between) if self.thought_form else None
        return closed[1] if closed else _END_THINK

    # ---------------------------------------------------------------------------- variables

    @cached_property
    def readable(self) -> frozenset[str]:
        """The names that the template may read, beside what every template is given."""
        tree = self._tree
        return (
            frozenset()
            if tree is None
            else frozenset(meta.find_undeclared_variables(tree) - _GIVEN)
        )

    @cached_property
    def variables(self) -> tuple[str, ...]:
        """Of the names that it may read, those that it does not set itself without asking."""
        if self._tree is None:
            return ()
        own = {name.name for name in self._tree.find_all(nodes.Name) if name.ctx == "store"}
        asked = [
            *(test.node for test in self._tree.find_all(nodes.Test) if "defined" in test.name),
            *(each.node for each in self._tree.find_all(nodes.Filter) if each.name == "default"),
        ]
        names = {node.name for node in asked if isinstance(node, nodes.Name)}
        return tuple(sorted(self.readable - (own - names)))

    @cached_property
    def _tree(self) -> nodes.Template | None:
        try:
            return self._template.environment.parse(self._template.source)
        except jinja2.TemplateSyntaxError:
            return None

    def _render(self, messages: list[Message], generation_prompt: bool = False) -> str:
        """A conversation; empty where the template refuses it."""
        try:
            return self._template.render(messages, "probe", generation_prompt=generation_prompt)
        except DataError:
            return ""
