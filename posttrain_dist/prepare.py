"""Data files + tokenizer -> the prepared folder that every worker maps: checked, tokenised, split.

train/ eval/            flat arrays (posttrain_dist.data.loader)
heldout_records.jsonl   the held-out rows as text, for answers by generation
summary.json            channels, counts, digests of all that went in; written last
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from posttrain_dist.config import RunConfig
from posttrain_dist.data.loader import write_examples
from posttrain_dist.data.masking import Encoder
from posttrain_dist.data.records import MAX_ERRORS, find_files, read_records
from posttrain_dist.data.sources import sources
from posttrain_dist.data.splitting import Numbered, content_key, split_off
from posttrain_dist.data.summary import Counts, Summary
from posttrain_dist.errors import ConfigError, DataError, ModelError, PosttrainError, raise_all
from posttrain_dist.files import sync
from posttrain_dist.flow import Example, Record
from posttrain_dist.models import Weights
from posttrain_dist.models.folder import check_folder, check_tokenizer, load_tokenizer, resolve

FORMAT = 1  # of the prepared folder; a change makes older folders unreadable
_TOKENIZER_FILES = (
    "added_tokens.json",
    "chat_template.jinja",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
)


def prepare(config: RunConfig, folder: Path, *, only_heldout: bool = False) -> Summary:
    """Check model folder and data, tokenise, and write `folder` whole or not at all.

    A folder that is there already and was made from the same input is used as it is.

    Args:
        only_heldout: leave the training split empty; a file in `data.eval` is then held out
            wholly, and `data.train` is not read.

    Raises:
        PosttrainError: any fault of the model folder, tokenizer or data; what is there was
            prepared from other input; with `only_heldout`, there is no held-out row.
    """
    model_folder = resolve(config.model.path)
    model_config = check_folder(model_folder, config.model.weights is Weights.load)
    paths = sources(config.data, config.objective.rows, only_heldout=only_heldout)
    inputs = _inputs(config, model_folder, paths)
    if folder.exists() and any(folder.iterdir()):
        return _reuse(folder, inputs)

    rows = config.objective.rows
    tokenizer = load_tokenizer(model_folder)
    check_tokenizer(tokenizer, model_folder, need_chat_template=rows == "messages")
    train, heldout, moved = _read(config, paths)
    if only_heldout:
        train = []
        _refuse_no_rows(heldout)
    channels = sorted({record.channel for _, record in [*train, *heldout]})
    encoder = Encoder(tokenizer, rows, config.data.max_length)
    splits = {"train": _encode(train, encoder, channels)}
    splits["eval"] = _encode(heldout, encoder, channels)
    summary = Summary(
        channels=channels,
        splits={split: _count(*result, channels) for split, result in splits.items()},
        duplicates_moved=moved,
        inputs=inputs,
    )
    _refuse_empty(summary, {"train": train, "eval": heldout})
    examples = {
        split: [e for e in result[1] if e.weight_L.any()] for split, result in splits.items()
    }
    _check_fit(model_config, [*examples["train"], *examples["eval"]], model_folder)
    kept = {example.sample_id for example in examples["eval"]}
    _write(folder, examples, [record for i, record in heldout if i in kept], summary)
    return summary


# ----------------------------------------------------------------------------------- input


def _inputs(config: RunConfig, model_folder: Path, paths: dict[str, str]) -> dict[str, Any]:
    """Everything that decides the content of the folder; equal inputs, equal content."""
    data = {
        split: {f"{i}:{f.name}": _digest(f) for i, f in enumerate(find_files(path))}
        for split, path in paths.items()
    }
    tokenizer = {
        name: _digest(model_folder / name)
        for name in _TOKENIZER_FILES
        if (model_folder / name).is_file()
    }
    return {
        "format": FORMAT,
        "rows": config.objective.rows,
        "max_length": config.data.max_length,
        "eval_fraction": config.data.eval_fraction,
        "seed": config.seed,
        "data": data,
        "tokenizer": tokenizer,
    }


def _digest(file: Path) -> str:
    try:
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise DataError(
            f"cannot be read: {error.strerror}", where=str(file), fix="check its permissions"
        ) from error


def _reuse(folder: Path, inputs: dict[str, Any]) -> Summary:
    summary = Summary.read(folder)
    changed = sorted(
        name
        for name in inputs.keys() | summary.inputs.keys()
        if inputs.get(name) != summary.inputs.get(name)
    )
    if changed:
        raise DataError(
            f"was prepared from other input: {', '.join(changed)} changed since",
            where=str(folder),
            fix="start a new run, put the old input back, or delete this folder to prepare anew",
        )
    return summary


# ------------------------------------------------------------------------------- the two splits


def _read(config: RunConfig, paths: dict[str, str]) -> tuple[list[Numbered], list[Numbered], int]:
    """(train, held-out, held-out rows left to train): no row stands in both."""
    records = read_records(paths["train"], config.objective.rows) if "train" in paths else []
    if "eval" not in paths:
        return split_off(records, config.data.eval_fraction, config.seed)
    known = {content_key(record) for record in records}
    rows = list(enumerate(read_records(paths["eval"], config.objective.rows)))
    kept = [(i, record) for i, record in rows if content_key(record) not in known]
    if not kept:
        raise DataError(
            "every held-out row also stands in the training data",
            where="data.eval",
            fix="give rows that are not trained on, or set data.eval=null to split some off",
        )
    return list(enumerate(records)), kept, len(rows) - len(kept)


# ------------------------------------------------------------------------------------- tokens


def _encode(
    rows: Sequence[Numbered], encoder: Encoder, channels: list[str]
) -> tuple[Sequence[Numbered], list[Example]]:
    index = {channel: i for i, channel in enumerate(channels)}
    examples: list[Example] = []
    problems: list[PosttrainError] = []
    for sample_id, record in rows:
        try:
            examples.append(encoder.encode(record, index[record.channel], sample_id))
        except DataError as error:
            problems.append(error)
            if len(problems) >= MAX_ERRORS:
                break
    raise_all(problems)
    return rows, examples


def _count(
    rows: Sequence[Numbered], examples: list[Example], channels: list[str]
) -> dict[str, Counts]:
    counts: dict[str, Counts] = {}
    for (_, record), example in zip(rows, examples, strict=True):
        channel = counts.setdefault(record.channel, Counts())
        supervised = int(np.count_nonzero(example.weight_L))
        channel.rows += 1
        channel.truncated += example.truncated
        channel.dropped += not supervised
        channel.supervised += supervised
        channel.tokens += len(example.input_ids_L) if supervised else 0
    return {channel: counts[channel] for channel in channels if channel in counts}


def _refuse_no_rows(heldout: list[Numbered]) -> None:
    if not heldout:
        raise DataError(
            "there is no held-out row",
            where="data.eval",
            fix="set data.eval=<a file of rows>, or data.eval_fraction above 0",
        )


def _refuse_empty(summary: Summary, rows: dict[str, list[Numbered]]) -> None:
    problems: list[PosttrainError] = []
    for split, counts in summary.splits.items():
        for channel, count in counts.items():
            if count.supervised or (split == "eval" and channel in summary.splits["train"]):
                continue
            places = [record.where for _, record in rows[split] if record.channel == channel]
            problems.append(
                DataError(
                    f"channel {channel!r} has no supervised token: all its {count.rows} rows are "
                    f"cut by data.max_length={summary.inputs['max_length']} before the answer",
                    where=", ".join(places[:3]) + (", ..." if len(places) > 3 else ""),
                    fix="raise data.max_length, shorten the rows or leave the channel out",
                )
            )
    raise_all(problems)


def _check_fit(model: dict[str, Any], examples: list[Example], folder: Path) -> None:
    """Token ids and positions that the model's embeddings do not have fail late and obscurely."""
    positions, vocabulary = model.get("max_position_embeddings"), model.get("vocab_size")
    longest = max(len(example.input_ids_L) for example in examples)
    largest = max(int(example.input_ids_L.max()) for example in examples)
    if isinstance(positions, int) and longest > positions:
        raise ConfigError(
            f"lets through a row of {longest} tokens, and the model has {positions} positions",
            where="data.max_length",
            fix=f"set data.max_length={positions}",
        )
    if isinstance(vocabulary, int) and largest >= vocabulary:
        raise ModelError(
            f"the tokenizer gives token {largest}, and the model's vocab_size is {vocabulary}",
            where=str(folder),
            fix="use the tokenizer that belongs to the model",
        )


# ------------------------------------------------------------------------------------- writing


def _write(
    folder: Path, examples: dict[str, list[Example]], heldout: list[Record], summary: Summary
) -> None:
    """Write beside `folder`, sync, and rename: a kill leaves nothing that looks complete."""
    partial = folder.with_name(folder.name + ".partial")
    try:
        if partial.exists():
            shutil.rmtree(partial)
        partial.mkdir(parents=True)
        for split, of_split in examples.items():
            write_examples(partial / split, of_split)
        lines = [json.dumps(_row(record), ensure_ascii=False) + "\n" for record in heldout]
        (partial / "heldout_records.jsonl").write_bytes("".join(lines).encode())
        (partial / "summary.json").write_text(json.dumps(asdict(summary), indent=1))
        for path in [*partial.rglob("*"), partial]:
            sync(path)
        partial.rename(folder)
        sync(folder.parent)
    except OSError as error:
        raise DataError(
            f"the prepared data cannot be written: {error.strerror}",
            where=str(folder),
            fix="check permissions and free space there",
        ) from error


def _row(record: Record) -> dict[str, Any]:
    row: dict[str, Any] = {"task_type": record.channel}
    row |= {"messages": record.messages} if record.text is None else {"text": record.text}
    return row | ({"check": record.check} if record.check else {})
