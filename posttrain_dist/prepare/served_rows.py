"""served.json: the chat templates as they are served, and training rows whose prompts prove it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import numpy.typing as npt

from posttrain_dist.data import CLOCK, Supervise, Template
from posttrain_dist.data.chat.rendering.chat_template import ChatTemplate
from posttrain_dist.data.chat.rendering.served import SERVED, Prompt, Served, ServedRow
from posttrain_dist.data.chat.rendering.served_template import served_templates, with_defaults
from posttrain_dist.data.chat.rendering.template_choice import TemplateSet
from posttrain_dist.data.chat.thoughts import chosen_thoughts
from posttrain_dist.data.compared.answer_encoder import as_conversation, best_answer
from posttrain_dist.data.prepared.arrays import Examples
from posttrain_dist.errors import DataError
from posttrain_dist.flow import Example, Message, Record
from posttrain_dist.models.tokenizer import ModelTokenizer
from posttrain_dist.prepare.fingerprint import Inputs
from posttrain_dist.prepare.split import Split, content_key
from posttrain_dist.prepare.tally import Tally

_ROWS = 3  # that are kept
_LOOKED_AT = 20  # first rows of each file set of training rows
_SETS = 10
_OTHER_DAY = "2001-02-03"


def write_served(
    choice: Template, inputs: Inputs, tally: Tally, split: Split, folder: Path
) -> None:
    """Write served.json; it holds null where the objective reads no conversations.

    Args:
        choice: of the template.
        folder: with `samples/` written.

    Raises:
        ModelError: a template of the tokenizer has a name that no file can have.
        ConfigError: what is given for a template's clock is no date.
    """
    if inputs.templates is None:
        (folder / SERVED).write_text("null", encoding="utf-8")
        return
    templates = served_templates(
        inputs.templates.sources,
        choice.variables,  # not the date of today, where only the clock says it
        variant=choice.variant,
        fixed=inputs.tokenizer.special_tokens_map,
    )
    day = inputs.date or _OTHER_DAY
    pinned = {name: with_defaults(text, {CLOCK: day}) for name, text in templates.items()}
    served = inputs.templates
    if pinned != served.sources:
        served = TemplateSet(inputs.tokenizer, pinned, Template())
    samples = _Samples(tally, split, Examples.open(folder, "all", tally.channels))
    rows = _rows_of(inputs, served, samples, choice)
    Served(templates, _choose(rows)).write(folder)


def _choose(rows: Iterator[ServedRow]) -> list[ServedRow]:
    """The first rows, of different kinds where there are such."""
    found = list(rows)
    kinds: dict[tuple[bool, bool], ServedRow] = {}
    for row in found:
        kinds.setdefault((bool(row.prompt.tools), bool(row.prompt.variables)), row)
    chosen = list(kinds.values())
    chosen += [row for row in found if not any(row is each for each in chosen)]
    return chosen[:_ROWS]


def _rows_of(
    inputs: Inputs, served: TemplateSet, samples: _Samples, choice: Template
) -> Iterator[ServedRow]:
    """The first training rows whose prompt, by the served templates, begins one of their samples.

    Others are passed over: a row that quotes a control token has other tokens than a server makes
    of it, and one that was cut may have lost its answer. Where the clock is read, the day of
    training goes with the row.

    Args:
        served: whose clock shows the day of training.
    """
    readers = [
        reader
        for each, reader in zip(inputs.sets, inputs.readers, strict=True)
        if each.split != "eval"
    ]
    for reader in readers[:_SETS]:
        for record in islice(reader, _LOOKED_AT):
            if isinstance(record, Record) and record.messages and CLOCK not in record.variables:
                trained = samples.of(content_key(record))
                if record.answers:
                    record = as_conversation(record, best_answer(record))
                row = _row(record, choice, inputs, served, trained)
                if row is not None and inputs.date is not None:
                    variables = {**row.prompt.variables, CLOCK: inputs.date}
                    row = replace(row, prompt=replace(row.prompt, variables=variables))
                if row is not None:
                    yield row


def _row(
    record: Record,
    choice: Template,
    inputs: Inputs,
    served: TemplateSet,
    trained: Sequence[Example],
) -> ServedRow | None:
    """The prompt of the last assistant turn for which it begins a sample.

    Args:
        trained: the samples of the row.

    Raises:
        DataError: the row is whole and quotes nothing, and the prompt of a turn begins none.
    """
    if not trained:
        return None
    found, missed = None, -1
    # apply_chat_template takes no empty conversation, and leaves out what is null.
    chosen = chosen_thoughts(record.messages, choice.thinking)
    given = [{key: v for key, v in each.items() if v is not None} for each in chosen]
    template = served.of(record.where, record.tools, record.variables)
    for turn in _asked(given):
        try:
            messages = template.as_given(given[:turn], record.where)
            text = template.render(
                messages, record.where, tools=record.tools, generation_prompt=True
            )
        except DataError:  # the template refuses a conversation that ends there
            continue
        ids = _encode(inputs.tokenizer, text)
        if any(_begins(each, ids) for each in trained):
            found = ServedRow(Prompt(messages, record.tools, record.variables), ids)
        elif missed < 0:
            missed = turn
    if missed >= 0 and _is_whole(record, choice, template, trained, found):
        with contextlib.suppress(DataError):
            upto = template.render(given[: missed + 1], record.where, tools=record.tools)
            missed = (
                -1
                if len(_encode(inputs.tokenizer, upto)) >= inputs.digest["max_length"]
                else missed
            )
        if missed >= 0:
            raise DataError(
                f"the inference prompt that a server writes for messages[{missed}] begins no "
                "sample of this row, so the model would be asked otherwise than it is trained",
                where=record.where,
                fix="choose another template, or leave the row out: the template looks at messages "
                "in a way that is not understood here",
            )
    return found


def _asked(messages: Sequence[Message]) -> list[int]:
    """The turns of the assistant that follow a question, or the result of a tool."""
    roles = [message["role"] for message in messages]
    first = next((i for i, role in enumerate(roles) if role not in ("system", "assistant")), 0)
    return [i for i, role in enumerate(roles) if role == "assistant" and i > first]


def _is_whole(
    record: Record,
    choice: Template,
    template: ChatTemplate,
    trained: Sequence[Example],
    found: ServedRow | None,
) -> bool:
    """Whether every turn of a row is trained, as a server would ask for it."""
    if not choice.strict or any(each.truncated for each in trained):
        return False
    *_, breaker = template.controls.escape(record.messages, record.tools)
    all_are = choice.supervise is Supervise.assistant and not record.weights
    return not breaker and (all_are or found is None)


def _encode(tokenizer: ModelTokenizer, text: str) -> list[int]:
    ids: list[int] = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
    return ids


def _begins(example: Example, ids: list[int]) -> bool:
    """Whether `ids` are the first tokens of a sample, and a target follows."""
    length = len(ids)
    same = np.array_equal(example.input_ids_L[:length], ids)
    return bool(same and example.weight_L[length:].any())


class _Samples:
    """The samples of training rows, found by the rows' content."""

    def __init__(self, tally: Tally, split: Split, examples: Examples) -> None:
        self._key_R, self._train_R = tally.column("key"), split.train_R
        self._row_S: npt.NDArray[np.int32] = tally.rows_of_samples()
        self._examples = examples

    def of(self, key: int) -> list[Example]:
        found = []
        for row in np.flatnonzero((self._key_R == np.uint64(key)) & self._train_R)[:_ROWS]:
            first, last = np.searchsorted(self._row_S, [row, row + 1]).tolist()
            whole = [i for i in range(first, last) if self._examples[i].weight_L.any()]
            found += [self._examples.path(i) for i in whole]
        return found
