"""served.json: the chat templates as they are served, and training rows whose prompts prove it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import numpy.typing as npt

from posttrain_dist.data import CLOCK, Template, Thinking
from posttrain_dist.data.chat.rendering.served import SERVED, Prompt, Served, ServedRow
from posttrain_dist.data.chat.rendering.served_template import served_templates, with_defaults
from posttrain_dist.data.chat.rendering.template_choice import TemplateSet
from posttrain_dist.data.chat.thoughts import chosen_thoughts
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
    rows = _rows_of(inputs, served, samples, choice.thinking)
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
    inputs: Inputs, served: TemplateSet, samples: _Samples, thinking: Thinking
) -> Iterator[ServedRow]:
    """The first training rows whose prompt, by the served templates, begins one of their samples.

    Others are passed over: a row that quotes a control token has other tokens than a server makes
    of it, and one that was cut may have lost its answer. Where the clock is read, the day of
    training goes with the row.

    Args:
        served: whose clock shows the day of training.
    """
    trained = [
        reader
        for each, reader in zip(inputs.sets, inputs.readers, strict=True)
        if each.split != "eval"
    ]
    for reader in trained[:_SETS]:
        for record in islice(reader, _LOOKED_AT):
            if isinstance(record, Record) and record.messages and CLOCK not in record.variables:
                messages = chosen_thoughts(record.messages, thinking)
                row = _row(record, messages, served, inputs.tokenizer, samples)
                if row is not None and inputs.date is not None:
                    variables = {**row.prompt.variables, CLOCK: inputs.date}
                    row = replace(row, prompt=replace(row.prompt, variables=variables))
                if row is not None:
                    yield row


def _row(
    record: Record,
    given: Sequence[Message],
    served: TemplateSet,
    tokenizer: ModelTokenizer,
    samples: _Samples,
) -> ServedRow | None:
    """The prompt of the last assistant turn for which it begins a sample.

    Raises:
        DataError: the row is whole and quotes nothing, and there is none.
    """
    trained, asked = samples.of(content_key(record)), 0
    # apply_chat_template takes no empty conversation, and leaves out what is null.
    given = [{key: v for key, v in each.items() if v is not None} for each in given]
    turns = [i for i, message in enumerate(given) if i and message["role"] == "assistant"]
    for turn in reversed(turns if trained else []):
        try:
            template = served.of(record.where, record.tools, record.variables)
            messages = template.as_given(given[:turn], record.where)
            text = template.render(
                messages, record.where, tools=record.tools, generation_prompt=True
            )
        except DataError:  # the template refuses a conversation that ends there
            continue
        ids, asked = (
            tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids,
            asked + 1,
        )
        if any(_begins(each, ids) for each in trained):
            return ServedRow(Prompt(messages, record.tools, record.variables), ids)
    *_, breaker = served.plain.controls.escape(record.messages, record.tools)
    if asked and not breaker and not any(each.truncated for each in trained):
        raise DataError(
            "no inference prompt that a server writes for this row begins a sample of it, so the "
            "model would be asked otherwise than it is trained",
            where=record.where,
            fix="choose another template, or leave the row out; the template may look at messages "
            "in a way that is not understood here",
        )
    return None


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
            found += [self._examples[i] for i in range(first, last)]
        return found
