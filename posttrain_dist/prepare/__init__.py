"""Data files + tokenizer -> the prepared folder that every worker maps: checked, tokenised, split.

samples/                flat arrays of all samples (posttrain_dist.data.prepared.arrays)
train.npy eval.npy      which of them each split holds
heldout_records.jsonl   held-out rows as text, for answers by generation: the first of each channel
served.json             chat templates for the export, and rows that check them; null: no template
summary.json            channels, counts, digests of all that went in
findings.json           what was found in the rows, of which data_report.py makes a run's report
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from posttrain_dist.data import CLOCK
from posttrain_dist.data.prepared.summary import Summary
from posttrain_dist.errors import ConfigError, DataError, ModelError, PosttrainError
from posttrain_dist.logs import ProgressCallback

if TYPE_CHECKING:
    from posttrain_dist.config import RunConfig
    from posttrain_dist.prepare.fingerprint import Inputs

__all__ = ["find_prepared", "prepare", "prepare_cached"]

Log = Callable[[str], None]
# Imports stand inside of the functions: the processes that tokenise import this package too, and
# need none of them.


def prepare(
    config: RunConfig,
    folder: Path,
    *,
    only_heldout: bool = False,
    progress: ProgressCallback | None = None,
    say: Log = lambda line: None,
) -> Summary:
    """Check model folder and data, tokenise, and write `folder` whole or not at all.

    A folder that is there already and was made from the same input is used as it is; so is one
    of the cache (`data.cache`), by hard links.

    Args:
        only_heldout: leave the training split empty; a file in `data.eval` is then held out
            wholly, and `data.train` is not read.
        progress: called as the files are read.
        say: called with what the user should know.

    Raises:
        PosttrainError: any fault of the model folder, tokenizer or data; what is there was
            prepared from other input; with `only_heldout`, there is no held-out row.
    """
    from posttrain_dist.prepare import build_dataset, fingerprint
    from posttrain_dist.prepare.cache import cache_folder, fetch

    if folder.exists() and any(folder.iterdir()):
        return _reuse(config, folder, only_heldout, say)
    inputs = fingerprint.fingerprint(config, only_heldout=only_heldout)
    cached = cache_folder(config.data.cache) / inputs.key

    def build(to: Path) -> None:
        build_dataset.build_dataset(config, inputs, to, only_heldout, progress)

    _say_date(inputs, say)
    fetch(cached, folder, build, say)
    summary = Summary.read(folder)
    try:
        _check_fit(inputs, summary)
    except PosttrainError:
        shutil.rmtree(folder)
        raise
    return summary


def prepare_cached(
    config: RunConfig,
    *,
    only_heldout: bool = False,
    progress: ProgressCallback | None = None,
    say: Log = lambda line: None,
) -> Path:
    """As `prepare`, but in the cache alone: its folder, which is only to be read.

    Raises:
        PosttrainError: as for `prepare`; the cache cannot be written to.
    """
    from posttrain_dist.prepare import build_dataset, fingerprint
    from posttrain_dist.prepare.cache import cache_folder, get_or_build

    inputs = fingerprint.fingerprint(config, only_heldout=only_heldout)
    cached = cache_folder(config.data.cache) / inputs.key

    def build(to: Path) -> None:
        build_dataset.build_dataset(config, inputs, to, only_heldout, progress)

    _say_date(inputs, say)
    get_or_build(cached, build, say)
    _check_fit(inputs, Summary.read(cached))
    return cached


def find_prepared(config: RunConfig) -> Path | None:
    """The folder that the cache has of the data of a config; None: it was not prepared.

    Raises:
        PosttrainError: model folder, tokenizer or data cannot be used.
    """
    from posttrain_dist.prepare import fingerprint
    from posttrain_dist.prepare.cache import cache_folder, is_whole

    inputs = fingerprint.fingerprint(config, only_heldout=False)
    cached = cache_folder(config.data.cache) / inputs.key
    return cached if is_whole(cached) else None


def _say_date(inputs: Inputs, say: Log) -> None:
    if inputs.date is not None:
        say(
            f"the chat template writes today's date into each prompt: {inputs.date}; to fix it, "
            f"set a variable that it reads, or 'template.variables={{{CLOCK}: \"{inputs.date}\"}}'"
        )


def _reuse(config: RunConfig, folder: Path, only_heldout: bool, say: Log) -> Summary:
    """What is there, if the same would be made again.

    Raises:
        DataError: something went in that is other now; a file of it is missing or cut.
    """
    from posttrain_dist.prepare import fingerprint
    from posttrain_dist.prepare.cache import is_whole

    summary = Summary.read(folder)
    if not is_whole(folder):
        raise DataError(
            "lacks a file, or has one that was cut",
            where=str(folder),
            fix="delete this folder: the data is then prepared again",
        )
    try:
        inputs = fingerprint.fingerprint(config, only_heldout=only_heldout)
    except DataError as error:  # the files of rows are gone: nothing can differ
        say(f"{error.where}: {error.what}; going on with the data that was prepared from it")
        return summary
    differ = fingerprint.changed(inputs.digest, summary.inputs)
    if differ:
        raise DataError(
            f"was prepared from other input: {', '.join(differ)} changed since",
            where=str(folder),
            fix="start a new run, or put the old input back; to begin this run again on the new "
            "input, delete this folder and add train.resume=never",
        )
    return summary


def _check_fit(inputs: Inputs, summary: Summary) -> None:
    """Token ids and positions that the model's embeddings do not have fail late and obscurely."""
    positions = inputs.model.get("max_position_embeddings")
    vocabulary = inputs.model.get("vocab_size")
    if isinstance(positions, int) and summary.longest > positions:
        raise ConfigError(
            f"lets through a row of {summary.longest} tokens, and the model has {positions} "
            "positions",
            where="data.max_length",
            fix=f"set data.max_length={positions}; data.long_rows=drop, split or truncate is what "
            "becomes of longer rows",
        )
    if isinstance(vocabulary, int) and summary.largest_id >= vocabulary:
        raise ModelError(
            f"the tokenizer gives token {summary.largest_id}, and the model's vocab_size is "
            f"{vocabulary}",
            where=str(inputs.model_folder),
            fix="use the tokenizer that belongs to the model",
        )
