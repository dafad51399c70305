"""Record with answers -> the tokens of its prompt, once, and of each answer behind it.

Each answer is encoded with its prompt, as a conversation of its own, by the checks that those of
other rows pass. Then the prompts of a row are compared: its answers can follow one prompt only if
the tokens before the first target are the same in all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from posttrain_dist.data import MAX_LENGTH, Form, Supervise, Template
from posttrain_dist.data.chat.checks.check_table import Faults
from posttrain_dist.data.chat.encoder import Encoder, RowExamples
from posttrain_dist.data.chat.rendering.template_choice import TemplateSet
from posttrain_dist.data.prefix import common_prefix_length
from posttrain_dist.errors import DataError, PosttrainError
from posttrain_dist.flow import Answer, Example, Record

_REMOVE = "remove the row"


@dataclass(frozen=True, slots=True)
class AnswerTokens:
    """What is said behind a prompt, up to the token that ends its last turn."""

    ids_L: npt.NDArray[np.int32]
    weight_L: npt.NDArray[np.float32]  # 1 of each target, 0 of turns in between
    value: float
    margin: float
    ends: bool = True  # with its end-of-turn token
    truncated: bool = False


@dataclass(slots=True)
class AnsweredRow:
    """A row as tokens: nothing of the prompt is a target."""

    prompt_L: npt.NDArray[np.int32]
    answers: list[AnswerTokens]
    faults: list[str] = field(default_factory=list)  # the checks that it fails, each once


class AnswerEncoder:
    """Turns records with answers into tokens.

    Args:
        tokenizer: a fast tokenizer of transformers.
        choice: which template; the turns of the assistant in each answer are targets.
        compares: whether a row must compare two answers of different values.
        without_margin: what would ignore the margin of a row, which is then refused; or "".
        templates: the loaded ones; null: they are loaded with the first row.
        ends: tokens at which generation stops, by the model's generation config.
    """

    def __init__(
        self,
        tokenizer: Any,
        choice: Template,
        *,
        compares: bool,
        without_margin: str = "",
        templates: TemplateSet | None = None,
        ends: Sequence[str] = (),
    ) -> None:
        self._tokenizer, self._choice, self._compares = tokenizer, choice, compares
        self._without_margin = without_margin
        # What is too long is cut when all answers of a row are known.
        self._encoder = Encoder(
            tokenizer,
            replace(choice, supervise=Supervise.assistant),
            max_length=MAX_LENGTH,
            templates=templates,
            ends=ends,
        )

    def load(self) -> None:
        """Make now what is otherwise made with the first rows."""
        self._encoder.load()

    def encode_many(self, records: Sequence[Record]) -> list[AnsweredRow | PosttrainError]:
        """For each row its tokens, or why it cannot be used.

        Only a DataError is returned; others say that no row can be encoded, and are raised.
        """
        found = self._forms(records)
        results: list[AnsweredRow | PosttrainError] = []
        for record, answers in zip(records, found, strict=True):
            try:
                results.append(self._row(record, answers))
            except DataError as error:
                results.append(self._encoder.advised(_conversations(record)[0], error))
        return results

    def _forms(self, records: Sequence[Record]) -> list[list[RowExamples | PosttrainError]]:
        """Of each row its answers, all in one form: the first that none of them refuses."""
        form, strict = self._choice.form, self._choice.strict
        tries = [(form, strict)]
        if form is Form.auto:
            tries = [(Form.conversation, True), (Form.turns, True)]
            tries += [] if strict else [(Form.conversation, False)]
        found: list[list[RowExamples | PosttrainError]] = [[] for _ in records]
        left = list(range(len(records)))
        for each, is_strict in tries:
            # Several turns of an answer are one sample in a whole conversation only.
            tried = [i for i in left if each is not Form.turns or _has_single_turns(records[i])]
            texts = [text for i in tried for text in _conversations(records[i])]
            encoded = iter(self._encoder.encode_as(texts, each, is_strict))
            for i in tried:
                found[i] = [next(encoded) for _ in records[i].answers]
            left = [i for i in left if not found[i] or _first_error(found[i])]
        return found

    def _row(self, record: Record, found: Sequence[RowExamples | PosttrainError]) -> AnsweredRow:
        """Compare the prompts and the answers of a row.

        Raises:
            DataError: an answer is refused, or the prompts differ, or nothing is compared.
        """
        if self._without_margin and any(answer.margin for answer in record.answers):
            raise DataError(
                f"has a margin, which {self._without_margin} has no place for",
                where=record.where,
                fix="leave the column out, or use a loss that takes margins: objective=simpo, "
                "objective=reward, or objective=dpo with loss_type=sigmoid",
            )
        if not found:
            raise DataError(
                "has an answer of several turns, and template.form=turns makes a sample of each",
                where=record.where,
                fix="set template.form=auto or conversation, or remove the row",
            )
        if (error := _first_error(found)) is not None:
            raise error
        rows = [each for each in found if isinstance(each, RowExamples)]
        faults = Faults(record.where, self._choice.strict)
        for row in rows:
            faults.names += [name for name in row.faults if name not in faults.names]
        examples = [row.examples[0] for row in rows]
        length = _prompt_length(examples, faults)
        if not length:
            what = "has answers that begin with different tokens: there is no prompt before them"
            raise DataError(what, where=record.where, fix=_REMOVE)
        closers = self._closers(record)
        answers = [
            self._answer(each, length, answer, closers)
            for each, answer in zip(examples, record.answers, strict=True)
        ]
        if self._compares:
            _refuse_same(record, answers)
        return AnsweredRow(examples[0].input_ids_L[:length], answers, faults.names)

    def _closers(self, record: Record) -> frozenset[int]:
        """The tokens that can end a turn."""
        template = self._encoder.templates.of(record.where, record.tools, record.variables)
        return frozenset(template.controls.ids[name] for name in template.controls.closers)

    def _answer(
        self, example: Example, length: int, answer: Answer, closers: frozenset[int]
    ) -> AnswerTokens:
        """What stands behind `length` tokens, without what the template adds to the last turn."""
        ids_L, weight_L = example.input_ids_L[length:], example.weight_L[length:]
        behind = int(np.flatnonzero(weight_L)[-1]) + 1
        last = behind
        while last and int(ids_L[last - 1]) not in closers:  # such as a line break that is trained
            if self._tokenizer.decode([int(ids_L[last - 1])]).strip():
                last = 0
            else:
                last -= 1
        behind = last or behind
        ids_L, weight_L = ids_L[:behind].copy(), weight_L[:behind].copy()
        return AnswerTokens(ids_L, weight_L, answer.value, answer.margin, ends=last > 0)


def as_conversation(record: Record, answer: Answer) -> Record:
    """A row of the prompt and one answer, whose turns of the assistant are trained on."""
    messages = record.messages + answer.messages
    said = tuple(float(message["role"] == "assistant") for message in answer.messages)
    weights = (0.0,) * len(record.messages) + said
    return replace(record, messages=messages, weights=weights, answers=())


def best_answer(record: Record) -> Answer:
    """The answer of a row that is worth most; of several the first."""
    return max(record.answers, key=lambda answer: answer.value)


def _conversations(record: Record) -> list[Record]:
    return [as_conversation(record, answer) for answer in record.answers]


def _has_single_turns(record: Record) -> bool:
    """Whether each answer is one turn of the assistant."""
    return all(len(answer.messages) == 1 for answer in record.answers)


def _first_error(found: Sequence[RowExamples | PosttrainError]) -> PosttrainError | None:
    return next((each for each in found if isinstance(each, PosttrainError)), None)


def _prompt_length(examples: Sequence[Example], faults: Faults) -> int:
    """Tokens that all answers follow.

    Raises:
        CheckFailed: what stands before the first target differs, and the checks are strict.
    """
    firsts = [int((each.weight_L > 0).argmax()) for each in examples]
    first_L = examples[0].input_ids_L[: firsts[0]]
    if all(
        np.array_equal(each.input_ids_L[:first], first_L)
        for each, first in zip(examples, firsts, strict=True)
    ):
        return firsts[0]
    ids = [each.input_ids_L[:first].tolist() for each, first in zip(examples, firsts, strict=True)]
    shared = min(common_prefix_length(ids[0], other) for other in ids)
    which = next(i for i, each in enumerate(ids) if each != ids[0])
    at = common_prefix_length(ids[0], ids[which])
    faults.note(
        "common_prompt",
        f"the prompt of answer {which + 1} has other tokens than that of answer 1, from token "
        f"{at} on ({len(ids[0])} and {len(ids[which])} tokens stand before the first target)",
    )
    return shared


def _refuse_same(record: Record, answers: Sequence[AnswerTokens]) -> None:
    """See that a row compares something.

    Raises:
        DataError: its answers are worth the same, or two of other values are the same tokens.
    """
    if len({answer.value for answer in answers}) < 2:
        what = "has no two answers of different scores, so nothing is compared"
        if len(answers) == 1:
            what = "has one answer, so nothing is compared"
        raise DataError(what, where=record.where, fix=_REMOVE)
    for i, answer in enumerate(answers):
        for j, other in enumerate(answers[:i]):
            if answer.value != other.value and np.array_equal(answer.ids_L, other.ids_L):
                raise DataError(
                    f"its answers {j + 1} and {i + 1} are the same tokens, and are worth "
                    f"{other.value:g} and {answer.value:g}",
                    where=record.where,
                    fix=_REMOVE,
                )
