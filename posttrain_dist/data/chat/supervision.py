"""Record -> texts in which each character has its weight as a target."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from posttrain_dist.data import Form, Supervise, Template
from posttrain_dist.data.chat import checks
from posttrain_dist.data.chat.checks import Faults
from posttrain_dist.data.chat.controls import ControlTokens, EscapedText, Span
from posttrain_dist.data.chat.conversation import OTHER_PROMPT, Conversation
from posttrain_dist.data.chat.rendering.chat_template import ChatTemplate
from posttrain_dist.data.chat.rendering.template_choice import TemplateSet
from posttrain_dist.data.chat.turn_spans import content_span, turn_spans
from posttrain_dist.errors import DataError
from posttrain_dist.flow import Message, Record

_MERGES = (
    "end the prompt where a token ends: move spaces or line breaks from the end of the prompt to "
    "the beginning of the completion"
)
Weighted = tuple[int, int, float]  # characters [start, end) and their weight as targets


@dataclass(slots=True)
class SupervisedText:
    """Text, before there are tokens; `spans` are the characters that are targets, in order."""

    escaped: EscapedText
    spans: list[Weighted]
    faults: Faults
    # Of each turn: length, name, and a fix if its last token is another in training.
    prompts: list[tuple[int, str, str]] = field(default_factory=list)
    controls: ControlTokens | None = None  # of its template; null where there is none
    num_filling: int = 0  # characters before the first target that alone fill the limit

    @property
    def is_plain(self) -> bool:
        """Whether there is no template: the tokenizer adds its own special tokens."""
        return self.controls is None

    @property
    def own_controls(self) -> ControlTokens:
        """Those of its template."""
        assert self.controls is not None, "plain text has none"
        return self.controls

    @property
    def text(self) -> str:
        """The text as it is tokenised."""
        return self.escaped.text

    @property
    def where(self) -> str:
        """The row, for errors."""
        return self.faults.where


class Supervision:
    """Decides which characters of a record are targets.

    Args:
        choice: what is supervised.
        templates: gives the chat templates; called with the first conversation.
    """

    def __init__(self, choice: Template, templates: Callable[[], TemplateSet]) -> None:
        self._choice, self._templates = choice, templates

    def texts(self, record: Record) -> Iterator[SupervisedText]:
        """The texts of a row of messages or of plain text; one for each sample.

        Raises:
            DataError: the row cannot be used, or a check fails and `strict` is set.
            ModelError, ConfigError: the chat template cannot be used.
        """
        if record.chosen or record.rejected:
            raise DataError(
                "is a preference row, and this objective trains on single answers",
                where=record.where,
                fix="give rows of messages, or choose an objective that compares answers",
            )
        if record.text is not None:
            yield self._plain(record, record.text)
        else:
            yield from self._chat(record)

    def _plain(self, record: Record, text: str) -> SupervisedText:
        start, faults = record.supervised_from, Faults(record.where, self._choice.strict)
        escaped, spans = EscapedText(text, None, (), ()), [(start, len(text), record.weight)]
        prompts = [(start, "", _MERGES)] if start else []
        return SupervisedText(escaped, spans, faults, prompts)

    def _chat(self, record: Record) -> Iterator[SupervisedText]:
        weights = self._weights(record)
        template = self._templates().of(record.where, record.tools, record.variables)
        messages, tools, breaker = template.controls.escape(record.messages, record.tools)
        if self._choice.form is not Form.turns or not any(weights):
            yield self._conversation(template, record, messages, tools, breaker, weights)
            return
        first = 0
        for turn, weight in enumerate(weights):
            if weight:
                only = [0.0] * turn + [weight]
                yield self._conversation(
                    template, record, messages[: turn + 1], tools, breaker, only, first
                )
                first = turn + 1

    def _weights(self, record: Record) -> list[float]:
        """The weight of each message: that of the row, else by `template.supervise`."""
        roles = [message["role"] for message in record.messages]
        supervise = self._choice.supervise
        supervised = [role == "assistant" for role in roles]
        if not any(supervised) and (record.reference or supervise is not Supervise.all):
            raise DataError(
                "holds a prompt and no answer, and this objective trains on answers",
                where=record.where,
                fix="end the row with what the assistant says, or choose an objective that "
                "lets the model answer",
            )
        if supervise is Supervise.last_turn:
            last = len(roles) - 1 - supervised[::-1].index(True)
            supervised = [i == last for i in range(len(roles))]
        elif supervise is Supervise.all:
            supervised = [role != "tool" for role in roles]
        given = record.weights or (None,) * len(roles)
        weights = [
            record.weight * (float(default) if weight is None else weight)
            for default, weight in zip(supervised, given, strict=True)
        ]
        for i, weight in enumerate(weights):
            if weight and roles[i] == "tool":
                raise DataError(
                    f"messages[{i}] is the result of a tool and has a weight in the loss",
                    where=record.where,
                    fix="remove the weight: the results of tools are not trained on",
                )
            if weight and roles[i] != "assistant" and self._choice.form is Form.turns:
                raise DataError(
                    f"messages[{i}] is of the {roles[i]} and has a weight in the loss, and "
                    "template.form=turns trains on turns of the assistant only",
                    where=record.where,
                    fix="remove the weight, or set template.form=conversation",
                )
        return weights

    def _conversation(
        self,
        template: ChatTemplate,
        record: Record,
        messages: Sequence[Message],
        tools: Sequence[Any],
        breaker: str,
        weights: Sequence[float],
        first: int = 0,
    ) -> SupervisedText:
        """One text; calls before messages[first] are not checked again."""
        where = record.where
        rendered = Conversation(template, messages, where, tools)
        escaped = template.controls.restore(rendered.text, breaker, where)
        faults = Faults(where, self._choice.strict, list(record.notes))
        text = SupervisedText(escaped, [], faults, controls=template.controls)
        if escaped.forged:
            text.faults.note("control_tokens", "the content quotes a control token")
        if tools or any("tool_calls" in message for message in messages):
            self._check_tools(rendered, first, text.faults)
        turns = turn_spans(rendered, [i for i, weight in enumerate(weights) if weight])
        for i, weight in enumerate(weights):
            if not weight:
                continue
            if i in turns:
                self._check_turn(rendered, i, turns[i], text)
            for start, end in turns[i] if i in turns else content_span(rendered, i):
                text.spans.append((escaped.place(start), escaped.place(end), weight))
        text.spans.sort()
        return text

    def _check_tools(self, rendered: Conversation, first: int, faults: Faults) -> None:
        plain = (
            rendered.template.render(rendered.messages, rendered.where) if rendered.tools else ""
        )
        is_called = any(message.get("tool_calls") for message in rendered.messages)
        name = "tools_shown" if is_called else "tools_listed"
        faults.note(name, checks.unseen_fault(rendered, plain, first))

    def _check_turn(
        self, rendered: Conversation, turn: int, spans: list[Span], text: SupervisedText
    ) -> None:
        faults = text.faults
        fault = checks.prompt_text_fault(rendered, turn, spans)
        fix = OTHER_PROMPT if fault and not rendered.begins_as_prompted(turn) else ""
        faults.note("prompt_prefix", fault, fix)
        faults.note("generation_prompt", checks.gap_fault(rendered, turn, spans))
        faults.note("generation_marks", checks.mark_fault(rendered, turn, spans))
        faults.note("content_shown", checks.shown_fault(rendered, turn, spans))
        faults.note("empty_turn", checks.empty_fault(rendered, turn))
        faults.note("end_of_turn", checks.end_fault(rendered, turn, spans))
        length = text.escaped.place(len(rendered.prompt(turn)))
        if "prompt_prefix" not in faults.names:
            fix, name = "", f"messages[{turn}]"
            if str(rendered.messages[turn].get("content") or "")[:1].isspace():
                fix = f"remove the white space at the beginning of {name}.content"
            text.prompts.append((length, f" of {name}", fix))
