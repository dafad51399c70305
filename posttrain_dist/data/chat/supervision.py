"""Record -> texts in which each character has its weight as a target."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from posttrain_dist.data import CLOCK, Form, Supervise, Template, Thinking
from posttrain_dist.data.chat.checks import shown, turn_faults
from posttrain_dist.data.chat.checks.check_table import Faults
from posttrain_dist.data.chat.controls import ControlTokens, EscapedText, Span
from posttrain_dist.data.chat.conversation import OTHER_PROMPT, Conversation
from posttrain_dist.data.chat.rendering.chat_template import ChatTemplate
from posttrain_dist.data.chat.rendering.template_choice import TemplateSet
from posttrain_dist.data.chat.thoughts import chosen_thoughts, split_thoughts
from posttrain_dist.data.chat.turn_form import turn_text
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
    is_turn: bool = False  # one turn behind its inference prompt
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

    def supervise(self, start: int, end: int, weight: float) -> None:
        """Make targets of characters, in places of the text before it was put together."""
        place = self.escaped.place
        self.spans.append((place(start), place(end), weight))

    def add_prompt(self, length: int, turn: int, message: Message) -> None:
        """Have the tokens of an inference prompt compared, which begins the text."""
        fix, name = "", f"messages[{turn}]"
        if str(message.get("content") or "")[:1].isspace():
            fix = f"remove the white space at the beginning of {name}.content"
        self.prompts.append((self.escaped.place(length), f" of {name}", fix))


class Supervision:
    """Decides which characters of a record are targets.

    Args:
        choice: what is supervised.
        templates: gives the chat templates; called with the first conversation.
    """

    def __init__(self, choice: Template, templates: Callable[[], TemplateSet]) -> None:
        self._choice, self._templates = choice, templates

    def texts(self, record: Record, form: Form, strict: bool) -> Iterator[SupervisedText]:
        """The texts of a row of messages or of plain text; one for each sample.

        Args:
            form: of conversations: `conversation` or `turns`.
            strict: a check that fails refuses the row.

        Raises:
            DataError: the row cannot be used, or a check fails and `strict` is set.
            ModelError, ConfigError: the chat template cannot be used.
        """
        if record.answers:
            raise DataError(
                "is a preference row, and this objective trains on single answers",
                where=record.where,
                fix="give rows of messages, or choose an objective that compares answers",
            )
        if record.text is not None:
            yield _plain(record, record.text, strict)
        else:
            yield from self._chat(record, form, strict)

    def has_turns(self, record: Record) -> bool:
        """Whether all that is supervised of a row are turns of the assistant."""
        if not record.messages or self._choice.supervise is Supervise.all:
            return False
        roles = (message["role"] for message in record.messages)
        return not record.weights or all(
            role == "assistant"
            for role, weight in zip(roles, record.weights, strict=True)
            if weight
        )

    def _chat(self, record: Record, form: Form, strict: bool) -> Iterator[SupervisedText]:
        template = self._templates().of(record.where, record.tools, record.variables)
        weights = self._weights(record)
        messages = chosen_thoughts(record.messages, self._choice.thinking)
        messages, tools, breaker = template.controls.escape(messages, record.tools)
        row = _Row(template, record.where, messages, tools, breaker)
        unasked = self._unasked(record, row, weights)
        notes = [*record.notes, *["assistant_first"] * unasked]
        if record.variables.keys() - template.probes.readable - {CLOCK}:
            notes.append("unread_variables")
        first = 0  # calls before this message are not checked again
        for turn, weight in enumerate(weights):
            if form is Form.turns and weight:
                faults = Faults(record.where, strict, list(notes))
                yield self._turn(row, turn, weight, faults, first)
                first = turn + 1
        if form is not Form.turns or not any(weights):
            faults = Faults(record.where, strict, list(notes))
            yield self._conversation(row, weights, faults)

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

    def _unasked(self, record: Record, row: _Row, weights: list[float]) -> bool:
        """Whether the row begins with words of the assistant that nobody asked for.

        Their weight is set to 0 where the row does not give one: no inference prompt leads to
        them.

        Raises:
            DataError: the row gives them a weight, and the template writes no prompt for that; or
                nothing else of it is supervised.
        """
        turn = next((i for i, m in enumerate(row.messages) if m["role"] != "system"), -1)
        if turn < 0 or row.messages[turn]["role"] != "assistant" or not weights[turn]:
            return False
        is_given = bool(record.weights) and record.weights[turn] is not None
        is_prompted = row.prompts(turn)
        if is_prompted and (turn or is_given):
            return False
        if is_given:
            raise DataError(
                f"messages[{turn}] is of the assistant and stands before any question, and the "
                "chat template writes no inference prompt for that",
                where=record.where,
                fix="begin the row with another role, or do not train on that turn "
                '(weight 0 or "train": false)',
            )
        weights[turn] = 0.0
        if not any(weights):
            raise DataError(
                "begins with the assistant, which nobody asked, and holds no other turn of it",
                where=record.where,
                fix="put a question before it"
                + (f', or give messages[{turn}] "weight": 1' if is_prompted else ""),
            )
        return True

    def _conversation(self, row: _Row, weights: Sequence[float], faults: Faults) -> SupervisedText:
        """The text of all messages."""
        rendered = Conversation(row.template, row.messages, row.where, row.tools)
        text = row.supervised(rendered.text, faults)
        _check_tools(rendered, 0, faults)
        turns = turn_spans(rendered, [i for i, weight in enumerate(weights) if weight])
        for i, weight in enumerate(weights):
            if not weight:
                continue
            if i in turns:
                self._check_turn(row, rendered, i, turns[i], text)
                turns[i] = self._without_empty_thoughts(rendered, i, turns[i], faults)
            for start, end in turns[i] if i in turns else content_span(rendered, i):
                text.supervise(start, end, weight)
        text.spans.sort()
        return text

    def _turn(
        self, row: _Row, turn: int, weight: float, faults: Faults, first: int
    ) -> SupervisedText:
        """The text of one turn behind its inference prompt."""
        messages = row.messages[: turn + 1]
        rendered = Conversation(row.template, messages, row.where, row.tools, by_marks=False)
        _check_tools(rendered, first, faults)
        self._check_thoughts(row, rendered, turn, faults)
        rendered.text, prompt = turn_text(rendered)
        text = row.supervised(rendered.text, faults)
        text.is_turn = True
        spans = [(len(prompt), len(rendered.text))]
        _check_words(rendered, turn, spans, faults)
        text.add_prompt(len(prompt), turn, rendered.messages[turn])
        for start, end in self._without_empty_thoughts(rendered, turn, spans, faults):
            text.supervise(start, end, weight)
        return text

    def _check_turn(
        self,
        row: _Row,
        rendered: Conversation,
        turn: int,
        spans: list[Span],
        text: SupervisedText,
    ) -> None:
        faults = text.faults
        fault = turn_faults.prompt_text_fault(rendered, turn, spans)
        fix = OTHER_PROMPT if fault and not rendered.begins_as_prompted(turn) else ""
        faults.note("prompt_prefix", fault, fix)
        self._check_thoughts(row, rendered, turn, faults)
        faults.note("generation_prompt", turn_faults.gap_fault(rendered, turn, spans))
        faults.note("generation_marks", turn_faults.mark_fault(rendered, turn, spans))
        faults.note("generation_marks", turn_faults.hole_fault(rendered, turn, spans))
        _check_words(rendered, turn, spans, faults)
        if "prompt_prefix" not in faults.names:
            text.add_prompt(len(rendered.prompt(turn)), turn, rendered.messages[turn])

    def _check_thoughts(self, row: _Row, rendered: Conversation, turn: int, faults: Faults) -> None:
        thinking = self._choice.thinking
        # Where the run takes thoughts out, an open block is closed.
        takes_out = thinking is Thinking.none or (thinking is Thinking.last and turn != row.last)
        if thinking is not Thinking.close and not takes_out:
            faults.note("open_thinking", turn_faults.open_thinking_fault(rendered, turn))
        faults.note("closed_thinking", turn_faults.closed_thinking_fault(rendered, turn))

    def _without_empty_thoughts(
        self, rendered: Conversation, turn: int, spans: list[Span], faults: Faults
    ) -> list[Span]:
        """Spans of a turn without the empty block of thoughts that the template begins it with.

        That block is the prompt's where thinking is switched off; `template.thinking=close` has
        the model learn to write it.
        """
        if not spans or self._choice.thinking is Thinking.close:
            return spans
        (start, end), *others = spans
        empty = rendered.template.probes.empty_thoughts.match(rendered.text, start, end)
        if not empty or split_thoughts(rendered.messages[turn]).words:
            return spans
        if rendered.template.probes.opens_thoughts(rendered.prompt(turn)):
            return spans  # the model closes what the prompt opens
        faults.note("empty_thinking", f"messages[{turn}] begins with an empty block of thoughts")
        return [(empty.end(), end), *others]


@dataclass(frozen=True, slots=True)
class _Row:
    """A row whose content can forge no control token, and the template that renders it."""

    template: ChatTemplate
    where: str
    messages: list[Message]
    tools: list[Any]
    breaker: str

    @property
    def last(self) -> int:
        """The last turn of the assistant."""
        turns = (i for i, message in enumerate(self.messages) if message["role"] == "assistant")
        return max(turns, default=-1)

    def supervised(self, text: str, faults: Faults) -> SupervisedText:
        """A rendering of it, put together again; nothing of it is a target yet."""
        escaped = self.template.controls.restore(text, self.breaker, self.where)
        if escaped.forged:
            faults.note("control_tokens", "the content quotes a control token")
        return SupervisedText(escaped, [], faults, controls=self.template.controls)

    def prompts(self, turn: int) -> bool:
        """Whether the template writes an inference prompt for a message."""
        expected = self.template.probes.generation_prompt
        try:
            prompt = self.template.render(
                self.messages[:turn], self.where, tools=self.tools, generation_prompt=True
            )
        except DataError:
            return False
        return bool(expected) and prompt.endswith(expected)


def _plain(record: Record, text: str, strict: bool) -> SupervisedText:
    start, faults = record.supervised_from, Faults(record.where, strict)
    escaped, spans = EscapedText(text, None, (), ()), [(start, len(text), record.weight)]
    prompts = [(start, "", _MERGES)] if start else []
    return SupervisedText(escaped, spans, faults, prompts)


def _check_tools(rendered: Conversation, first: int, faults: Faults) -> None:
    is_called = any(message.get("tool_calls") for message in rendered.messages)
    if not rendered.tools and not is_called:
        return
    plain = rendered.template.render(rendered.messages, rendered.where) if rendered.tools else ""
    name = "tools_shown" if is_called else "tools_listed"
    faults.note(name, shown.unseen_fault(rendered, plain, first))


def _check_words(rendered: Conversation, turn: int, spans: list[Span], faults: Faults) -> None:
    faults.note("content_shown", shown.shown_fault(rendered, turn, spans))
    faults.note("empty_turn", turn_faults.empty_fault(rendered, turn))
    fix = turn_faults.end_fix(rendered)
    faults.note("end_of_turn", turn_faults.end_fault(rendered, turn, spans), fix)
