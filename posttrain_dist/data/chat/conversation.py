"""One conversation as text: the places of its turns, and its inference prompts."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from typing import Any

from posttrain_dist.data.chat.controls import Span
from posttrain_dist.data.chat.template import ChatTemplate
from posttrain_dist.errors import DataError
from posttrain_dist.flow import Message

_SPACE = re.compile(r"\s*")
_ADD_MARKS = (
    "wrap what the assistant says, with its end-of-turn token, in {% generation %} ... "
    "{% endgeneration %} in the chat template"
)
OTHER_PROMPT = (
    "choose the template of the model's family (template=<one of docs/templates.md>), or give "
    "template.name the path of a copy of this one (.jinja) whose turns begin as its inference "
    "prompt ends"
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
        self.by_marks = template.marks_assistant if by_marks is None else by_marks
        self._starts: dict[int, int] = {}  # message -> its place, where the template is causal
        self._additions = template.additions if cut else None
        starts = self._starts if self._additions else None
        self.text, self._marks = template.render_marked(
            messages, where, tools, generation_prompt=False, marks=self.by_marks, starts=starts
        )
        # Turn -> where its mark begins, if that is before the turn.
        self.early: dict[int, int] = {}
        self._asked = (0, "")  # the prompt that was last cut from the text, and its turn
        self._prompts: dict[int, str] = {}
        self._prefixes: dict[int, str] = {len(messages): self.text}

    def prompt(self, turn: int) -> str:
        """What the model is given when it is to write message `turn`."""
        if self._additions and turn and turn in self._starts:
            if self._asked[0] != turn:
                self._asked = turn, self.text[: self._starts[turn]] + self._additions[0]
            return self._asked[1]
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

    def other_prompt(self, turn: int, text: str) -> str:
        """What is wrong where the inference prompt of a turn does not begin `text`."""
        prompt = self.prompt(turn)
        same = _common(prompt, text)
        ends, begins = (t[same : same + 60] + "..." * (len(t) > same + 60) for t in (prompt, text))
        return (
            f"the inference prompt of messages[{turn}] does not begin the training text: it ends "
            f"in {ends!r}, and the turn begins with {begins!r}"
        )

    def begins_as_prompted(self, turn: int) -> bool:
        """Whether the inference prompt begins what is written of the turn while it is the last."""
        return self.upto(turn).startswith(self.prompt(turn))

    def shows_content(self, turn: int) -> bool:
        """Whether the template writes the content of a message, where it is the last."""
        sign, _ = self._signs()
        message = self.messages[turn]
        signed = {**message, "content": (message.get("content") or "") + sign}
        messages = [*self.messages[:turn], signed]
        try:
            return sign in self._template.render(messages, self.where, tools=self.tools)
        except DataError:
            return True

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
            DataError: that cannot be proved for this row.
        """
        turns = [i for i, m in enumerate(self.messages) if m["role"] == "assistant"]
        asked = turns if wanted is None else [turn for turn in turns if turn in wanted]
        found = self._marked_spans(turns, asked) if self.by_marks else self._prefix_spans(asked)
        return {turn: [s for s in spans if s[0] < s[1]] for turn, spans in found.items()}

    def content_span(self, index: int) -> list[Span]:
        """Where the content of any message stands, with the special token that ends it.

        The message is rendered a second time between two signs; it stands where they are, if
        the text is the same without them.

        Raises:
            DataError: that cannot be proved for this row.
        """
        content = self.messages[index].get("content")
        if not isinstance(content, str) or not content.strip():
            return []
        left, right = self._signs()
        bare = content.strip()
        signed = content.replace(bare, left + bare + right, 1)
        messages = [*self.messages]
        messages[index] = {**self.messages[index], "content": signed}
        twin = self._template.render(messages, self.where, tools=self.tools)
        start, end = twin.find(left), twin.find(right) - 1
        once = twin.count(left) == twin.count(right) == 1 and start < end
        if not once or twin.replace(left, "").replace(right, "") != self.text:
            raise DataError(
                f"the chat template changes messages[{index}].content, so its place in the text "
                "cannot be proved",
                where=self.where,
                fix="set template.policy=assistant, and no weight on messages of other roles",
            )
        return [(start, self._widen(index, end))]

    def own_text(self, turn: int) -> str:
        """What message `turn` adds to the conversation; the whole where it cannot be the last."""
        try:
            prompt, upto = self.prompt(turn), self.upto(turn)
        except DataError:
            return self.text
        if upto.startswith(prompt):
            return upto[len(prompt) :]
        return upto[_common(prompt, upto) :]

    # ------------------------------------------------------------------------------- inside

    def _marked_spans(self, turns: list[int], asked: list[int]) -> dict[int, list[Span]]:
        """By the template's own marks.

        Marks around the content alone are widened by the end-of-turn token behind it. Where
        nothing is said, what a mark ends in may be a token of the header.
        """
        spans: dict[int, list[Span]] = {turn: [] for turn in asked}
        places = {turn: i for i, turn in enumerate(turns)}
        if len(turns) == len(self._marks) and all(self._has_one(t, places[t]) for t in asked):
            spans = {turn: [self._marks[places[turn]]] for turn in asked}
        else:
            for span in self._marks:
                owner = self._owner(turns, span)
                if owner in spans:
                    spans[owner].append(span)
        for turn, found in spans.items():
            if found and not (self.ends_turn(found[-1]) and self.says(turn)):
                found[-1] = (found[-1][0], self._widen(turn, found[-1][1]))
            if found and found[0][0] < len(self.prompt(turn)):
                spans[turn] = self._without_header(turn, found)
        return spans

    def _without_header(self, turn: int, spans: list[Span]) -> list[Span]:
        """Spans of a turn without what its inference prompt gives.

        A mark may also hold the header, if that is all it holds and its end is the turn's: where
        a mark stands in a macro, both its ends are wrong.
        """
        prompt, start = self.prompt(turn), spans[0][0]
        given = len(prompt)
        if not self.text.startswith(prompt):
            given = _common(prompt, self.text)
            if not self._controls.closing.search(self.text, start, given):
                return spans
        cut = [(max(a, given), b) for a, b in spans if b > given]
        before = self.text[start:given].strip()
        if before and not (cut and self._adds_header(turn, start) and self.ends_turn(cut[-1])):
            self.early[turn] = start
        return cut

    def _adds_header(self, turn: int, start: int) -> bool:
        """Whether all of the prompt behind `start` is there for the sake of this turn."""
        try:
            before = self.upto(turn - 1)
        except DataError:
            return False
        return start >= len(before) and self.prompt(turn).startswith(before)

    def _has_one(self, turn: int, place: int) -> bool:
        """Whether of all marks that at `place` alone ends in what the turn adds to the text."""
        first, last, marks = len(self.prompt(turn)), len(self.upto(turn)), self._marks
        if not first <= marks[place][1] <= last or (place and marks[place - 1][1] >= first):
            return False
        return place + 1 == len(marks) or marks[place + 1][1] > last

    def _owner(self, turns: list[int], span: Span) -> int:
        """The turn that a mark belongs to: a template may mark a turn twice, or not at all."""
        begun = [t for t in turns if self.text[: span[0]].startswith(self.prompt(t))]
        if begun and len(self.prompt(begun[-1])) <= span[1] <= len(self.upto(begun[-1])):
            return begun[-1]
        raise DataError(
            f"the chat template marks {len(self._marks)} stretches of text for {len(turns)} "
            "assistant turns, and which is whose cannot be proved",
            where=self.where,
            fix=f"{_ADD_MARKS}; or set template.explode_turns=true",
        )

    def _prefix_spans(self, asked: list[int]) -> dict[int, list[Span]]:
        """By rendering every prefix: a turn is what it adds behind the generation prompt."""
        spans = {}
        for turn in asked:
            prompt, upto = self.prompt(turn), self.upto(turn)
            if not upto.startswith(prompt):
                raise DataError(
                    self.other_prompt(turn, upto),
                    where=self.where,
                    fix=OTHER_PROMPT,
                )
            end = self._turn_end(turn)
            if not self.text.startswith(upto[:end]):
                raise DataError(
                    "the chat template renders earlier turns differently once later ones follow "
                    f"(seen at messages[{turn}]), so what the assistant says cannot be told from "
                    "the rest",
                    where=self.where,
                    fix=f"{_ADD_MARKS}; or set template.explode_turns=true",
                )
            spans[turn] = [(len(prompt), end)]
        return spans

    def _turn_end(self, turn: int) -> int:
        """End of the turn in `upto(turn)`: behind the special token that closes it.

        A template without an end token: its separator is all that tells the end of the turn.
        """
        upto = self.upto(turn)
        first, last = len(self.prompt(turn)), self._own_end(upto)
        found = [m.span() for m in self._controls.closing.finditer(upto, first, last)]
        if not found:
            return last
        is_last = not upto[found[-1][1] : last].strip()
        if self.messages[turn].get("tool_calls"):  # may be full of special tokens
            return found[-1][1] if is_last else last
        if is_last and len(found) == 1 and self.says(turn):
            return found[0][1]  # what is said cannot stand behind it
        # The header, or what was thought, has some too, or may quote what is said.
        said = self._content_end(turn)
        end = next((end for start, end in found if start >= said), 0)
        return self._behind_all(upto, end) if end else last

    def _own_end(self, upto: str) -> int:
        """Where `upto` ends without what the template adds to each conversation."""
        trailer = self._template.trailer
        return len(upto) - len(trailer) if trailer and upto.endswith(trailer) else len(upto)

    def _behind_all(self, upto: str, end: int) -> int:
        """`end`, behind a closing token, moved behind those of the same turn that follow it.

        They stand in the text and in `upto`, where the turn is the last. White space may stand
        before the end token of the tokenizer only: another may open the next turn.
        """
        last = -1
        while True:
            space = self._space(end)
            token = self._controls.closing.match(self.text, end + space)
            if not token or (space and token[0] != self._controls.eos):
                return end
            last = self._own_end(upto) if last < 0 else last
            if token.end() > last or upto[end : token.end()] != self.text[end : token.end()]:
                return end
            end = token.end()

    def _content_end(self, turn: int) -> int:
        """Where the content of a turn ends in `upto(turn)`: proved by a sign that is put there."""
        sign, _ = self._signs()
        message = self.messages[turn]
        content = message.get("content") or ""
        bare = content.rstrip()
        signed = {**message, "content": bare + sign + content[len(bare) :]}
        messages = [*self.messages[:turn], signed]
        twin = self._template.render(messages, self.where, tools=self.tools)
        if twin.count(sign) != 1 or twin.replace(sign, "") != self.upto(turn):
            raise DataError(
                f"where messages[{turn}] ends in the text of the chat template cannot be proved",
                where=self.where,
                fix=f"{_ADD_MARKS}, or set its weight to 0",
            )
        return twin.index(sign)

    def _signs(self) -> tuple[str, str]:
        """Two characters that stand nowhere in the conversation."""
        used = set(self.text).union(*(set(repr(m)) for m in self.messages))
        first, second, *_ = (c for c in map(chr, range(0xF700, 0xF8FF)) if c not in used)
        return first, second

    @property
    def closing(self) -> re.Pattern[str]:
        """The special tokens, but those of thoughts."""
        return self._controls.closing

    def says(self, turn: int) -> bool:
        """Whether the turn has words, or calls a tool."""
        message = self.messages[turn]
        return bool(message.get("tool_calls") or str(message.get("content") or "").strip())

    def ends_turn(self, span: Span) -> bool:
        """Whether the last thing in the span is a special token, and none of a thought."""
        said = self.text[span[0] : span[1]]
        closers = self._controls.closers
        return said.endswith(closers) or said.rstrip().endswith(closers)

    def stops_early(self, turn: int, span: Span) -> bool:
        """Whether a closing token of the turn stands directly behind the one that ends the span."""
        text, end = self.text, span[1]
        while text[end - 1].isspace():
            end -= 1
        if end == len(text) or not self._controls.closing.match(text, end + self._space(end)):
            return False
        upto = self.upto(turn)
        return upto[:end] == self.text[:end] and self._behind_all(upto, end) > span[1]

    def _space(self, at: int) -> int:
        """How much white space stands at `at` in the text."""
        if not self.text[at : at + 1].isspace():
            return 0
        found = _SPACE.match(self.text, at)
        return found.end() - at if found else 0

    def _widen(self, turn: int, end: int) -> int:
        """`end` moved behind the special tokens that end the message.

        Which they are shows where the conversation ends with this message: behind an inner
        one stands what opens the next.
        """
        at = end + self._space(end)
        token = self._controls.closing.match(self.text, at)
        if not token:
            return end
        try:
            alone = self.upto(turn)
        except DataError:  # no conversation of its own: the end token belongs to a later message
            return end
        # Its own turn may be rendered otherwise when it is the last; how it ends is the same.
        if self.text.startswith(alone[: token.end()]) and len(alone) >= token.end():
            return self._behind_all(alone, token.end())
        ends = self._last_tokens(alone)
        return next((at + len(e) for e in ends if self.text.startswith(e, at)), end)

    def _last_tokens(self, upto: str) -> list[str]:
        """The run of closing tokens at the end of `upto`, and how it ends, longest first."""
        upto = upto[: self._own_end(upto)].rstrip()
        ends: list[str] = []
        at = len(upto)
        for start, end in reversed([m.span() for m in self._controls.closing.finditer(upto)]):
            if end != at:
                break
            ends.insert(0, upto[start:])
            at = start
        return ends


def _common(a: str, b: str) -> int:
    """How many characters two texts begin with alike."""
    pairs = enumerate(zip(a, b, strict=False))
    return next((i for i, (x, y) in pairs if x != y), min(len(a), len(b)))
