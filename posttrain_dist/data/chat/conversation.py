"""One conversation as text, and the inference prompt of each of its turns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from posttrain_dist.data.chat.rendering.chat_template import ChatTemplate
from posttrain_dist.data.prefix import common_prefix_length
from posttrain_dist.errors import DataError
from posttrain_dist.flow import Message

ADD_MARKS = (
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
        self.template, self.controls = template, template.controls
        self.messages, self.tools, self.where = messages, tools, where
        self.by_marks = template.marks_assistant if by_marks is None else by_marks
        self._starts: dict[int, int] = {}  # message -> its place, where the template is causal
        self._additions = template.additions if cut else None
        starts = self._starts if self._additions else None
        text, self.marks = template.render_marked(
            messages, where, tools, generation_prompt=False, marks=self.by_marks, starts=starts
        )
        self.text = self._ended(text, len(messages) - 1)
        # Turn -> where its mark begins, if that is before the turn; `turn_spans` finds them.
        self.early: dict[int, int] = {}
        self._last_prompt = (0, "")  # the prompt that was last cut from the text, and its turn
        self._prompts: dict[int, str] = {}
        self._prefixes: dict[int, str] = {len(messages): self.text}

    def prompt(self, turn: int) -> str:
        """What the model is given when it is to write message `turn`."""
        if self._additions and turn and turn in self._starts:
            if self._last_prompt[0] != turn:
                self._last_prompt = turn, self.text[: self._starts[turn]] + self._additions[0]
            return self._last_prompt[1]
        if turn not in self._prompts:
            try:
                self._prompts[turn] = self.template.render(
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
            text = self.text[: self._starts[turn + 1]] + self._additions[1]
            return self._ended(text, turn)
        if turn + 1 not in self._prefixes:
            text = self.template.render(self.messages[: turn + 1], self.where, tools=self.tools)
            self._prefixes[turn + 1] = self._ended(text, turn)
        return self._prefixes[turn + 1]

    def twin(self, messages: Sequence[Message]) -> str:
        """The text of other messages of the same roles."""
        text = self.template.render(messages, self.where, tools=self.tools)
        return self._ended(text, len(messages) - 1)

    def _ended(self, text: str, last: int) -> str:
        """The text of messages up to `last`, with the end that the template does not write there.

        A generation prompt that it writes without being asked is not part of the conversation.
        """
        probes = self.template.probes
        text = text.removesuffix(probes.always_prompt)
        if last < 0 or self.messages[last]["role"] != "assistant":
            return text
        end = probes.missing_end(bool(self.messages[last].get("tool_calls")))
        return text.removesuffix(probes.last_space) + end if end else text

    def own_text(self, turn: int) -> str:
        """What message `turn` adds to the conversation; the whole where it cannot be the last."""
        try:
            prompt, upto = self.prompt(turn), self.upto(turn)
        except DataError:
            return self.text
        if upto.startswith(prompt):
            return upto[len(prompt) :]
        return upto[common_prefix_length(prompt, upto) :]

    def begins_as_prompted(self, turn: int) -> bool:
        """Whether the inference prompt begins what is written of the turn while it is the last."""
        return self.upto(turn).startswith(self.prompt(turn))

    def prompt_mismatch(self, turn: int, text: str) -> str:
        """What is wrong where the inference prompt of a turn does not begin `text`."""
        prompt = self.prompt(turn)
        same = common_prefix_length(prompt, text)
        ends, begins = (t[same : same + 60] + "..." * (len(t) > same + 60) for t in (prompt, text))
        return (
            f"the inference prompt of messages[{turn}] does not begin the training text: it ends "
            f"in {ends!r}, and the turn begins with {begins!r}"
        )

    def has_output(self, turn: int) -> bool:
        """Whether the turn has words, or calls a tool."""
        message = self.messages[turn]
        return bool(message.get("tool_calls") or str(message.get("content") or "").strip())

    def shows_content(self, turn: int) -> bool:
        """Whether the template writes the content of a message, where it is the last."""
        sentinel, _ = self.sentinels()
        message = self.messages[turn]
        signed = {**message, "content": (message.get("content") or "") + sentinel}
        messages = [*self.messages[:turn], signed]
        try:
            return sentinel in self.template.render(messages, self.where, tools=self.tools)
        except DataError:
            return True

    def sentinels(self) -> tuple[str, str]:
        """Two characters that stand nowhere in the conversation."""
        used = set(self.text).union(*(set(repr(m)) for m in self.messages))
        first, second, *_ = (c for c in map(chr, range(0xF700, 0xF8FF)) if c not in used)
        return first, second
