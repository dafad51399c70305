"""One conversation as text: the places of its turns, and its inference prompts."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from posttrain_dist.data.controls import Span
from posttrain_dist.data.template import ChatTemplate
from posttrain_dist.errors import DataError, ModelError
from posttrain_dist.flow import Message

_ADD_MARKS = (
    "wrap what the assistant says, with its end-of-turn token, in {% generation %} ... "
    "{% endgeneration %} in the chat template"
)


class Conversation:
    """One conversation as a template renders it; each of its prefixes is rendered once at most.

    Args:
        template, messages, where, tools: what is rendered.
        by_marks: find turns by the template's marks or by prefixes; null: by marks if it has them.
        cut: take prefixes from the text instead of rendering them, where that is the same.
    """

    def __init__(
        self,
        template: ChatTemplate,
        messages: Sequence[Message],
        where: str,
        tools: Sequence[Any] = (),
        by_marks: bool | None = None,
        cut: bool = True,
    ) -> None:
        self._template, self._controls = template, template.controls
        self.messages, self.tools, self.where = messages, tools, where
        self._by_marks = template.marks_assistant if by_marks is None else by_marks
        self._starts: dict[int, int] = {}  # message -> its place, where the template is causal
        self._additions = template.additions if cut else None
        starts = self._starts if self._additions else None
        self.text, self._marks = template.render_marked(
            messages, where, tools, generation_prompt=False, marks=self._by_marks, starts=starts
        )
        self._prompts: dict[int, str] = {}
        self._prefixes: dict[int, str] = {len(messages): self.text}

    def prompt(self, turn: int) -> str:
        """What the model is given when it is to write message `turn`."""
        if self._additions and turn and turn in self._starts:
            return self.text[: self._starts[turn]] + self._additions[0]
        if turn not in self._prompts:
            try:
                self._prompts[turn] = self._template.render(
                    self.messages[:turn], self.where, tools=self.tools, generation_prompt=True
                )
            except DataError as error:
                if turn:
                    raise
                raise DataError(
                    "begins with the assistant, and the chat template writes no inference prompt "
                    "for that",
                    where=self.where,
                    fix="begin the row with another role, or do not train on messages[0] "
                    '(weight 0 or "train": false)',
                ) from error
        return self._prompts[turn]

    def upto(self, turn: int) -> str:
        """The conversation as it was when message `turn` was its last."""
        if self._additions and turn + 1 < len(self.messages) and turn + 1 in self._starts:
            return self.text[: self._starts[turn + 1]] + self._additions[1]
        if turn + 1 not in self._prefixes:
            self._prefixes[turn + 1] = self._template.render(
                self.messages[: turn + 1], self.where, tools=self.tools
            )
        return self._prefixes[turn + 1]

    def turn_spans(self, wanted: Collection[int] | None = None) -> dict[int, list[Span]]:
        """Assistant message -> where in the text it stands, with its end-of-turn token.

        Args:
            wanted: the messages that are asked about; null: all of the assistant.

        Raises:
            ModelError: that cannot be proved.
        """
        turns = [i for i, m in enumerate(self.messages) if m["role"] == "assistant"]
        asked = turns if wanted is None else [turn for turn in turns if turn in wanted]
        found = self._marked_spans(turns, asked) if self._by_marks else self._prefix_spans(asked)
        return {turn: [s for s in spans if s[0] < s[1]] for turn, spans in found.items()}

    def content_span(self, index: int) -> list[Span]:
        """Where the content of any message stands, with the special token that ends it.

        The message is rendered a second time between two signs; it stands where they are, if
        the text is the same without them.

        Raises:
            ModelError: that cannot be proved.
        """
        content = self.messages[index].get("content")
        if not isinstance(content, str) or not content.strip():
            return []
        used = set(self.text).union(*(set(repr(m)) for m in self.messages))
        left, right = [c for c in map(chr, range(0xF700, 0xF8FF)) if c not in used][:2]
        bare = content.strip()
        signed = content.replace(bare, left + bare + right, 1)
        messages = [*self.messages]
        messages[index] = {**self.messages[index], "content": signed}
        twin = self._template.render(messages, self.where, tools=self.tools)
        start, end = twin.find(left), twin.find(right) - 1
        once = twin.count(left) == twin.count(right) == 1 and start < end
        if not once or twin.replace(left, "").replace(right, "") != self.text:
            raise ModelError(
                f"{self.where}: the chat template changes messages[{index}].content, so its place "
                "in the text cannot be proved",
                where="chat template",
                fix="set template.policy=assistant, and no weight on messages of other roles",
            )
        return [(start, self._widen(index, end))]

    # ------------------------------------------------------------------------------- inside

    def _marked_spans(self, turns: list[int], asked: list[int]) -> dict[int, list[Span]]:
        """By the template's own marks.

        Marks around the content alone are widened by the end-of-turn token behind it.
        """
        spans: dict[int, list[Span]] = {turn: [] for turn in asked}
        one_each = dict(zip(turns, self._marks, strict=False))
        if len(turns) == len(self._marks) and all(self._is_of(one_each[t], t) for t in asked):
            spans = {turn: [one_each[turn]] for turn in asked}
        else:
            for span in self._marks:
                owner = self._owner(turns, span)
                if owner in spans:
                    spans[owner].append(span)
        for turn, found in spans.items():
            if found and not self.ends_turn(found[-1]):
                found[-1] = (found[-1][0], self._widen(turn, found[-1][1]))
        return spans

    def _is_of(self, span: Span, turn: int) -> bool:
        """Whether a mark ends in what the turn adds to the text."""
        return len(self.prompt(turn)) <= span[1] <= len(self.upto(turn))

    def _owner(self, turns: list[int], span: Span) -> int:
        """The turn that a mark belongs to: a template may mark a turn twice, or not at all."""
        begun = [t for t in turns if self.text[: span[0]].startswith(self.prompt(t))]
        if begun:
            return begun[-1]
        raise ModelError(
            f"{self.where}: the chat template marks {len(self._marks)} stretches of text for "
            f"{len(turns)} assistant turns, and which is whose cannot be proved",
            where="chat template",
            fix=_ADD_MARKS,
        )

    def _prefix_spans(self, asked: list[int]) -> dict[int, list[Span]]:
        """By rendering every prefix: a turn is what it adds behind the generation prompt."""
        spans = {}
        for turn in asked:
            prompt, upto = self.prompt(turn), self.upto(turn)
            end = len(prompt) + self._turn_end(upto[len(prompt) :], self.messages[turn])
            if not (upto.startswith(prompt) and self.text.startswith(upto[:end])):
                raise ModelError(
                    f"{self.where}: the chat template renders earlier turns differently once "
                    f"later ones follow (seen at messages[{turn}]), so what the assistant says "
                    "cannot be told from the rest",
                    where="chat template",
                    fix=f"{_ADD_MARKS}; or set template.explode_turns=true",
                )
            spans[turn] = [(len(prompt), end)]
        return spans

    def _turn_end(self, added: str, message: Message) -> int:
        """End of the turn in the text that it added: behind the special token that closes it."""
        if message.get("tool_calls"):  # may be full of special tokens: the last one closes it
            found = [m.end() for m in self._controls.pattern.finditer(added)]
            return found[-1] if found else len(added)
        content = (message.get("content") or "").strip()
        thought = str(message.get("reasoning_content") or "").strip()
        before = added.find(thought) + len(thought)  # what was thought may quote what is said
        at = added.find(content, max(before, 0))
        closing = self._controls.pattern.search(added, at + len(content) if at >= 0 else 0)
        # A template without an end token: its separator is all that tells the end of the turn.
        return closing.end() if closing else len(added)

    def ends_turn(self, span: Span) -> bool:
        """Whether the last thing in the span is a special token."""
        said = self.text[span[0] : span[1]]
        names = self._controls.names
        return said.endswith(names) or said.rstrip().endswith(names)

    def _widen(self, turn: int, end: int) -> int:
        """`end` moved behind the special token that ends the message.

        Which one that is shows where the conversation ends with this message: behind an inner
        one stands what opens the next.
        """
        space = len(self.text) - end - len(self.text[end:].lstrip())
        token = self._controls.pattern.match(self.text, end + space)
        if not token:
            return end
        try:
            alone = self.upto(turn)
        except DataError:  # no conversation of its own: the end token belongs to a later message
            return end
        # Its own turn may be rendered otherwise when it is the last; how it ends is the same.
        nests = self.text.startswith(alone[: token.end()]) and len(alone) >= token.end()
        return token.end() if nests or self._last_token(alone) == token[0] else end

    def _last_token(self, text: str) -> str:
        found = [m for m in self._controls.pattern.finditer(text) if not text[m.end() :].strip()]
        return found[-1][0] if found else ""
