"""The work of `prepare`: encode every row once; then split, check, count and write."""

from __future__ import annotations

import contextlib
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from posttrain_dist.config import RunConfig
from posttrain_dist.data import ANSWERS, LongRows, OnBadRow, Thinking
from posttrain_dist.data.chat.checks.check_table import CHECKS
from posttrain_dist.data.chat.rendering.template_choice import TemplateSet
from posttrain_dist.data.chat.thoughts import chosen_thoughts
from posttrain_dist.data.compared.answer_encoder import as_conversation, best_answer
from posttrain_dist.data.formats.records import Unit
from posttrain_dist.data.prepared.arrays import SplitWriter
from posttrain_dist.data.prepared.summary import Summary
from posttrain_dist.data.read.bad_row import errors_by_cause
from posttrain_dist.errors import DataError, PosttrainError, raise_all
from posttrain_dist.flow import Record
from posttrain_dist.logs import ProgressCallback
from posttrain_dist.prepare.chunk import MAX_REJECTED, Chunk
from posttrain_dist.prepare.fingerprint import Inputs, refuse_changed
from posttrain_dist.prepare.processes.workers import SMALL_BYTES, encode
from posttrain_dist.prepare.row_encoder import Job, Task
from posttrain_dist.prepare.served_rows import write_served
from posttrain_dist.prepare.similar import Bands
from posttrain_dist.prepare.split import Split, keep_apart, split_off
from posttrain_dist.prepare.summarise import findings, summarise
from posttrain_dist.prepare.tally import Tally

LONG_ANSWERS = "set data.long_rows=drop (leaves such rows out), or raise data.max_length"
LONG_ROWS = (
    "set data.long_rows=drop (leaves such rows out) or split (makes several samples of each; "
    "truncate is what was done), or raise data.max_length"
)
UNIT_BYTES = 2 << 20  # of JSON lines that a process takes at once
TEXT_ROWS = 256  # held-out rows of each channel that are kept as text


def build_dataset(
    config: RunConfig,
    inputs: Inputs,
    folder: Path,
    only_heldout: bool,
    progress: ProgressCallback | None,
) -> None:
    """Fill `folder`, which is there and empty.

    Raises:
        PosttrainError: a fault of the data; all that were found together.
    """
    with contextlib.closing(Bands(folder)) as bands:
        _build(config, inputs, folder, only_heldout, progress, Tally(TEXT_ROWS, bands))


def _build(
    config: RunConfig,
    inputs: Inputs,
    folder: Path,
    only_heldout: bool,
    progress: ProgressCallback | None,
    tally: Tally,
) -> None:
    complete = _encode(config, inputs, folder / "samples", tally, progress)
    refuse_changed(inputs)
    _refuse_rows(config, tally, complete)
    split = _split(config, inputs, tally)
    if only_heldout:
        split.train_R[:] = False
        if not split.heldout_R.any():
            raise DataError(
                "there is no held-out row",
                where="data.eval",
                fix="set data.eval=<a file of rows>, or data.eval_fraction above 0",
            )
    tally.sort_channels(folder / "samples")
    row_S = tally.rows_of_samples()
    for name, side_R in (("train", split.train_R), ("eval", split.heldout_R)):
        np.save(folder / f"{name}.npy", np.flatnonzero(side_R[row_S]))
    summary = summarise(inputs, tally, split, folder)
    _refuse_empty(summary, tally)
    thinking = config.template.thinking
    texts = (_row(record, inputs.templates, thinking) for record in _texts(tally, split))
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in texts]
    (folder / "heldout_records.jsonl").write_bytes("".join(lines).encode())
    write_served(config.template, inputs, tally, split, folder)
    (folder / "summary.json").write_text(json.dumps(asdict(summary), indent=1), encoding="utf-8")
    found = json.dumps(findings(inputs, tally, folder), ensure_ascii=False, indent=1)
    (folder / "findings.json").write_bytes(found.encode())


def _encode(
    config: RunConfig,
    inputs: Inputs,
    samples: Path,
    tally: Tally,
    progress: ProgressCallback | None,
) -> bool:
    """Encode all rows into `samples`; whether it was not left early, for too many bad ones."""
    seed = inputs.digest["seed"] or 0  # for the rows that are shown
    job = Job(
        inputs.tokenizer,
        inputs.template,
        config.data,
        seed,
        TEXT_ROWS,
        inputs.ends,
        config.objective.rows,
        config.objective.own_rows,
        config.objective.without_margin,
    )
    plan = [
        (index, unit)
        for index, reader in enumerate(inputs.readers)
        for unit in reader.units(UNIT_BYTES)
    ]
    total = sum(size for size, *_ in inputs.states.values())
    processes = min(config.data.workers or len(os.sched_getaffinity(0)), len(plan))
    processes = 1 if total < SMALL_BYTES else processes
    own_heldout = any(each.split == "eval" for each in inputs.sets)

    def task(index: int, unit: Unit) -> Task:
        keep_text = inputs.sets[index].split == "eval" or not own_heldout
        return Task(inputs.readers[index], unit, in_order=own_heldout, keep_text=keep_text)

    stop_early = config.data.on_bad_row is OnBadRow.error
    answers = encode(job, (task(*each) for each in plan), processes, inputs.templates)
    with SplitWriter(samples) as writer, contextlib.closing(answers):
        for done, ((index, _), chunks) in enumerate(zip(plan, answers, strict=True), start=1):
            for chunk in chunks:
                if stop_early and len(tally.rejected) >= MAX_REJECTED:
                    return False
                _store(writer, chunk, tally, index)
            if progress is not None:
                progress(done, len(plan))
    return True


def _store(writer: SplitWriter, chunk: Chunk, tally: Tally, index: int) -> None:
    """Write the samples of a chunk, now that their channels and places have numbers."""
    first = tally.num_samples
    channel_R = tally.add(chunk, index)
    numbers = {
        "channels": channel_R[chunk.row_S],
        "ids": np.arange(first, tally.num_samples),
    }
    writer.append({**chunk.examples, **numbers}, source=index)


def _split(config: RunConfig, inputs: Inputs, tally: Tally) -> Split:
    key_R = tally.column("key")
    given = [i for i, each in enumerate(inputs.sets) if each.split == "eval"]
    if given:
        return keep_apart(key_R, tally.of_sets(given))
    return split_off(tally.column("channel"), key_R, config.data.eval_fraction, config.seed)


# ------------------------------------------------------------------------------- refusals


def _refuse_rows(config: RunConfig, tally: Tally, complete: bool) -> None:
    """Rows that were rejected, and checks that too many rows fail."""
    complete = complete and len(tally.rejected) == tally.num_rejected
    all_count = tally.ends_file or config.data.on_bad_row is OnBadRow.error
    if all_count or not tally.num_rows:
        raise_all(errors_by_cause(tally.rejected, complete=complete))
    if tally.num_left_out and not tally.num_rows:
        raise DataError(
            "every row has the weight 0, or train is false",
            where=next(iter(tally.rows_of_file)),
            fix='remove "train" and "weight" from the rows that are to be trained on',
        )
    if not config.template.strict:
        return
    long_rows = LONG_ANSWERS if config.objective.rows in ANSWERS else LONG_ROWS
    problems: list[PosttrainError] = []
    for name, failed in sorted(tally.failed.items()):
        check = CHECKS[name]
        refused = check.level == "error" and failed > check.allowed * tally.num_rows
        if not refused and not (check.refused_if_all and failed == tally.num_rows):
            continue
        places = ", ".join(tally.failed_places[name][:3]) + (", ..." if failed > 3 else "")
        what = f"{failed} of {tally.num_rows} rows fail the check {name!r}: {check.explain}"
        cut = int(tally.column("truncated").sum())
        fix = check.fix
        if name == "end_of_turn" and cut >= failed:
            what = (
                f"{cut} of {tally.num_rows} rows are longer than data.max_length="
                f"{config.data.max_length}, and {failed} of them lose their end of turn where they "
                "are cut: a model that is not taught it never stops (check 'end_of_turn')"
            )
            fix = long_rows
        elif name == "end_of_turn" and cut:
            what += f" {cut} rows are cut, being longer than data.max_length."
            fix = f"{long_rows}; {fix}"
        fix += "; template.strict=false trains all the same"
        problems.append(DataError(what, where=places, fix=fix))
    raise_all(problems)


def _refuse_empty(summary: Summary, tally: Tally) -> None:
    """Every channel has a supervised token, or training on it would be silently nothing."""
    problems: list[PosttrainError] = []
    for split, counts in summary.splits.items():
        for channel, count in counts.items():
            if count.supervised or (split == "eval" and channel in summary.splits["train"]):
                continue
            places = tally.dropped_places.get(channel, [])
            why = "every turn has the weight 0, or train is false"
            fix = "let the rows teach something, or leave the channel out"
            limit = summary.inputs["max_length"]
            longer = "raise data.max_length or leave the channel out"
            has_answers = summary.inputs["rows"] in ANSWERS
            if count.truncated:
                why = f"{count.truncated} are cut by data.max_length={limit} before the answer"
                fix = f"set data.long_rows=split, {longer}"
            elif count.dropped and summary.inputs["long_rows"] == LongRows.drop.name:
                why = (
                    f"data.long_rows=drop leaves out {count.dropped} above data.max_length={limit}"
                )
                fix = longer if has_answers else f"set data.long_rows=split, {longer}"
            elif count.dropped and has_answers:
                why = (
                    f"of {count.dropped} the prompt leaves its answers no room in data.max_length="
                    f"{limit}, or so little that they are the same"
                )
                fix = longer
            problems.append(
                DataError(
                    f"channel {channel!r} has no supervised token in {count.rows} rows: {why}",
                    where=", ".join(places[:3]) + (", ..." if len(places) > 3 else ""),
                    fix=fix,
                )
            )
    raise_all(problems)


# ------------------------------------------------------------------------------ held-out text


def _texts(tally: Tally, split: Split) -> list[Record]:
    """Held-out rows that were kept as text, in the order of the files."""
    found = {row: record for _, row, record in tally.texts.values() if split.heldout_R[row]}
    return [found[row] for row in sorted(found)]


def _row(record: Record, templates: TemplateSet | None, thinking: Thinking) -> dict[str, Any]:
    """A row as `apply_chat_template` is asked with it, with the thoughts that are trained on."""
    row: dict[str, Any] = {"task_type": record.channel}
    if record.answers:
        record = as_conversation(record, best_answer(record))
    if record.text is not None:
        row["text"] = record.text
    elif templates is None:
        row["messages"] = record.messages
    else:
        template = templates.of(record.where, record.tools, record.variables)
        messages = chosen_thoughts(record.messages, thinking)
        row["messages"] = template.as_given(messages, record.where)
    row |= {"tools": record.tools} if record.tools else {}
    row |= {"chat_template_kwargs": dict(record.variables)} if record.variables else {}
    return row | ({"check": record.check} if record.check else {})
