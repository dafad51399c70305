"""`posttrain inspect --template`: one conversation as the template renders it, turn by turn."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice

from posttrain_dist.config import RunConfig
from posttrain_dist.data import Form
from posttrain_dist.data.chat.checks.check_table import CHECKS
from posttrain_dist.data.chat.encoder import Encoder, RowExamples
from posttrain_dist.data.chat.turn_view import TurnView, view_turns
from posttrain_dist.data.compared.answer_encoder import as_conversation, best_answer
from posttrain_dist.data.read.bad_row import errors_by_cause
from posttrain_dist.errors import ConfigError, DataError, PosttrainError, raise_all
from posttrain_dist.flow import Record
from posttrain_dist.models.tokenizer import ModelTokenizer
from posttrain_dist.prepare.fingerprint import Inputs, fingerprint
from posttrain_dist.prepare.row_encoder import unusable
from posttrain_dist.report.data.token_runs import clean

_ROWS = 50  # that are tried
_SHOWN = 1200  # characters of a prompt, of which the end is shown
_LENGTH = 1 << 20  # tokens: rows are shown whole


def print_template(config: RunConfig) -> None:
    """Print the template's facts, one of the first rows turn by turn, and what is refused.

    Raises:
        PosttrainError: rows that the checks refuse, each cause once; or no row can be shown.
    """
    inputs = fingerprint(config, only_heldout=False)
    if inputs.templates is None:
        raise ConfigError(
            "no template is used: these rows are no conversations",
            where="template",
            fix="give rows of messages, or leave --template out",
        )
    rows = list(islice(_records(inputs), _ROWS))
    if not rows:
        raise DataError(
            "no row can be read" if inputs.readers else "there is no row",
            where="data.train",
            fix="`posttrain inspect` without --template says what is wrong",
        )
    _print_facts(config, inputs)
    results = _encoder(inputs).encode_many(rows)
    kept = [i for i, result in enumerate(results) if isinstance(result, RowExamples)]
    shown = max(kept or range(len(rows)), key=lambda i: (_richness(rows[i]), -i))
    result = results[shown]
    if isinstance(result, PosttrainError):
        print(f"\n{clean(rows[shown].where)} would be refused; as it is rendered all the same:")
        result = _rendered_all_the_same(inputs, rows[shown]) or result
    if isinstance(result, RowExamples):
        _print_row(rows[shown], result, inputs.tokenizer)
    refused = [
        unusable(result, row)
        for row, result in zip(rows, results, strict=True)
        if isinstance(result, PosttrainError)
    ]
    if not refused:
        print(f"\nnone of the first {len(rows)} rows is refused")
    raise_all(errors_by_cause(refused, complete=len(rows) < _ROWS))


def _rendered_all_the_same(inputs: Inputs, record: Record) -> RowExamples | None:
    """A row that the checks refuse, in the first form in which it can be shown."""
    for form in (Form.turns, Form.conversation):
        with contextlib.suppress(PosttrainError):
            loose = replace(inputs.template, form=form, strict=False)
            return _encoder(replace(inputs, template=loose)).encode(record)
    return None


def _records(inputs: Inputs) -> Iterator[Record]:
    """Rows as conversations; of those with answers the prompt and the best one."""
    for reader in inputs.readers:
        for row in reader:
            if isinstance(row, Record) and row.messages:
                yield as_conversation(row, best_answer(row)) if row.answers else row


def _encoder(inputs: Inputs) -> Encoder:
    return Encoder(inputs.tokenizer, inputs.template, max_length=_LENGTH, ends=inputs.ends)


def _richness(record: Record) -> int:
    """How much of a template a conversation shows."""
    roles = [message["role"] for message in record.messages]
    thinks = any("reasoning_content" in message for message in record.messages)
    return min(roles.count("assistant"), 2) + bool(record.tools) + thinks + ("system" in roles)


def _print_facts(config: RunConfig, inputs: Inputs) -> None:
    assert inputs.templates is not None
    template, probes = config.template, inputs.templates.plain.probes
    sources = list(inputs.templates.sources)
    listed = f" (by name: {', '.join(sources)})" if len(sources) > 1 else ""
    print(f"template: {template.name}{listed}")
    if template.variables:
        print(f"variables: {json.dumps(template.variables, ensure_ascii=False)}")
    unset = [name for name in probes.variables if name not in template.variables]
    if unset:
        print(f"it also reads, by template.variables or chat_template_kwargs: {', '.join(unset)}")
    if inputs.date is not None:
        print(f"it writes today's date: {inputs.date}")
    print(f"form: {template.form.name}, thoughts: {template.thinking.name}")


def _print_row(record: Record, result: RowExamples, tokenizer: ModelTokenizer) -> None:
    num = len(result.examples)
    how = "each turn is a sample of its own" if result.by_turns else "one sample"
    print(f"\n{clean(record.where)}, channel {clean(record.channel)}: {how}")
    number = 0
    for sample, example in enumerate(result.examples, start=1):
        for view in view_turns(example, tokenizer):
            number += 1
            of = f", sample {sample} of {num}" if num > 1 else ""
            print(f"\n── turn {number}{of}")
            _print_turn(view)
    for name in result.faults:
        print(f"\n{name}: {CHECKS[name].explain}\n  {CHECKS[name].fix}")


def _print_turn(view: TurnView) -> None:
    cut = f"... {view.prompt[-_SHOWN:]}" if len(view.prompt) > _SHOWN else view.prompt
    parts = {"prompt": cut, "trained on": view.trained, "its end": view.end or "NONE"}
    for title, text in parts.items():
        first, *others = str(clean(text)).split("\n")
        print(f"{title:>10} │{first}")
        for line in others:
            print(f"{'':>10} │{line}")
