"""Record -> samples as text: which characters are targets, with which weight."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from posttrain_dist.data import Policy, Template
from posttrain_dist.data.chat import checks
from posttrain_dist.data.chat.checks import CHECKS
from posttrain_dist.data.chat.controls import Protected, Span
from posttrain_dist.data.chat.conversation import OTHER_PROMPT, Conversation
from posttrain_dist.data.chat.template import ChatTemplate
from posttrain_dist.errors import DataError
from posttrain_dist.flow import Message, Record

_MASKED = -100  # the label of a token that is no target
_MERGES = (
    "end the prompt where a token ends: move spaces or line breaks from the end of the prompt to "
    "the beginning of the completion"
)
Weighted = tuple[int, int, float]  # characters [start, end) and their weight as targets


@dataclass(slots=True)
class Sample:
    """A sample before it is tokenised."""

    where: str
    protected: Protected
    spans: list[Weighted]
    # Of each turn: length, name, and how to mend it if its last token is another in training.
    prompts: list[tuple[int, str, str]] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    is_text: bool = False  # no template: the tokenizer adds its own special tokens
    num_filling: int = 0  # characters before the first target that alone fill the limit
    # Of a row that comes as tokens:
    ids: list[int] | None = None
    weights: npt.NDArray[np.float32] | None = None

    def note(self, name: str, what: str, strict: bool, fix: str = "") -> None:
        """Write a fault down, or refuse the row for it; an empty `what` is no fault.

        `fix` is for this row, if that of the check is not.

        Raises:
            DataError: the check is of level "error", and `strict` is set.
        """
        if not what:
            return
        check = CHECKS[name]
        if strict and check.level == "error":
            raise DataError(what, where=self.where, fix=fix or check.fix)
        if name not in self.faults:
            self.faults.append(name)


class Supervision:
    """Decides what of a record is learned.

    Args:
        choice: the policy.
        template: gives the chat template; asked for with the first conversation.
    """

    def __init__(self, choice: Template, template: Callable[[], ChatTemplate]) -> None:
        self._choice, self._template = choice, template

    def samples(self, record: Record) -> Iterator[Sample]:
        """The samples of a row, not yet tokenised.

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
        if record.input_ids:
            yield self._given(record)
        elif record.text is not None:
            yield self._plain(record, record.text)
        else:
            yield from self._chat(record)

    def _given(self, record: Record) -> Sample:
        """A row of tokens is taken as it is."""
        weights = np.ones(len(record.input_ids), np.float32)
        if record.labels:
            weights = (np.array(record.labels) != _MASKED).astype(np.float32)
        nothing = Protected("", None, (), ())
        return Sample(record.where, nothing, [], ids=list(record.input_ids), weights=weights)

    def _plain(self, record: Record, text: str) -> Sample:
        start = record.supervised_from
        sample = Sample(record.where, Protected(text, None, (), ()), [(start, len(text), 1.0)])
        sample.is_text = True
        if start:
            sample.prompts.append((start, "", _MERGES))
        return sample

    def _chat(self, record: Record) -> Iterator[Sample]:
        weights = self._weights(record)
        messages, tools, breaker = self._template().controls.break_up(record.messages, record.tools)
        if not self._choice.explode_turns or not any(weights):
            yield self._conversation(record, messages, tools, breaker, weights)
            return
        first = 0
        for turn, weight in enumerate(weights):
            if weight:
                only = [0.0] * turn + [weight]
                yield self._conversation(record, messages[: turn + 1], tools, breaker, only, first)
                first = turn + 1

    def _weights(self, record: Record) -> list[float]:
        """The weight of each message: what the row says, else what the policy says."""
        roles = [message["role"] for message in record.messages]
        policy = self._choice.policy
        supervised = [role == "assistant" for role in roles]
        if not any(supervised) and (record.reference or policy is not Policy.all):
            raise DataError(
                "holds a prompt and no answer, and this objective trains on answers",
                where=record.where,
                fix="end the row with what the assistant says, or choose an objective that "
                "lets the model answer",
            )
        if policy is Policy.last_turn:
            last = len(roles) - 1 - supervised[::-1].index(True)
            supervised = [i == last for i in range(len(roles))]
        elif policy is Policy.all:
            supervised = [role != "tool" for role in roles]
        asked = record.weights or (None,) * len(roles)
        weights = [
            float(own) if weight is None else weight
            for own, weight in zip(supervised, asked, strict=True)
        ]
        for i, weight in enumerate(weights):
            if weight and roles[i] == "tool":
                raise DataError(
                    f"messages[{i}] is the result of a tool and has a weight in the loss",
                    where=record.where,
                    fix="remove the weight: the model is not to learn what tools answer",
                )
            if weight and roles[i] != "assistant" and self._choice.explode_turns:
                raise DataError(
                    f"messages[{i}] is of the {roles[i]} and has a weight in the loss, and "
                    "template.explode_turns=true teaches turns of the assistant only",
                    where=record.where,
                    fix="remove the weight, or set template.explode_turns=false",
                )
        return weights

    def _conversation(
        self,
        record: Record,
        messages: Sequence[Message],
        tools: Sequence[Any],
        breaker: str,
        weights: Sequence[float],
        first: int = 0,
    ) -> Sample:
        """A sample; calls before messages[first] are not looked at again."""
        where = record.where
        rendered = Conversation(self._template(), messages, where, tools)
        protected = self._template().controls.restore(rendered.text, breaker, where)
        sample = Sample(where, protected, [])
        if protected.forged:
            sample.faults.append("control_tokens")
        if tools or any("tool_calls" in message for message in messages):
            self._check_tools(rendered, first, sample)
        turns = rendered.turn_spans([i for i, weight in enumerate(weights) if weight])
        for i, weight in enumerate(weights):
            if not weight:
                continue
            if i in turns:
                self._check_turn(rendered, i, turns[i], sample)
            for start, end in turns[i] if i in turns else rendered.content_span(i):
                sample.spans.append((protected.place(start), protected.place(end), weight))
        sample.spans.sort()
        return sample

    def _check_tools(self, rendered: Conversation, first: int, sample: Sample) -> None:
        plain = self._template().render(rendered.messages, rendered.where) if rendered.tools else ""
        is_called = any(message.get("tool_calls") for message in rendered.messages)
        name = "tools_shown" if is_called else "tools_listed"
        sample.note(name, checks.unseen_fault(rendered, plain, first), self._choice.strict)

    def _check_turn(
        self, rendered: Conversation, turn: int, spans: list[Span], sample: Sample
    ) -> None:
        strict = self._choice.strict
        fault = checks.prompt_text_fault(rendered, turn, spans)
        fix = OTHER_PROMPT if fault and not rendered.begins_as_prompted(turn) else ""
        sample.note("prompt_prefix", fault, strict, fix)
        sample.note("generation_prompt", checks.gap_fault(rendered, turn, spans), strict)
        sample.note("generation_marks", checks.mark_fault(rendered, turn, spans), strict)
        sample.note("content_shown", checks.shown_fault(rendered, turn, spans), strict)
        sample.note("empty_turn", checks.empty_fault(rendered, turn), strict)
        sample.note("end_of_turn", checks.end_fault(rendered, turn, spans), strict)
        length = sample.protected.place(len(rendered.prompt(turn)))
        if "prompt_prefix" not in sample.faults:
            fix, name = "", f"messages[{turn}]"
            if str(rendered.messages[turn].get("content") or "")[:1].isspace():
                fix = f"remove the white space at the beginning of {name}.content"
            sample.prompts.append((length, f" of {name}", fix))
