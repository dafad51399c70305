"""Which files the rows of each split come from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain_dist.data import ANSWERS, CONVERTS, DataConfig, Format
from posttrain_dist.data.embedded import split_path
from posttrain_dist.data.formats.records import Reader, find_files
from posttrain_dist.data.read.tables import HF, load_hf
from posttrain_dist.errors import ConfigError, PosttrainError, raise_all

EMBEDDED = "embedded"
# What an objective reads -> the formats that its rows may be written in.
ACCEPTS = {
    "messages": frozenset(
        {
            Format.messages,
            Format.sharegpt,
            Format.alpaca,
            Format.prompt_completion,
            Format.tokens,
        }
    ),
    "text": frozenset({Format.text, Format.tokens}),
    "pairs": frozenset({Format.preference, Format.ranking, Format.scored_answers}),
    "labels": frozenset({Format.unpaired}),
    "scores": frozenset({Format.scored_answers, Format.scored_completion}),
}


@dataclass(frozen=True, slots=True)
class FileSet:
    """The files of one source, or of the held-out rows."""

    name: str  # of the source; "eval" for the held-out rows
    split: str  # "train" or "eval"
    key: str  # of the configuration, for errors
    path: str
    converts: bool = False  # pairs are read too, each as two single answers

    @property
    def files(self) -> list[Path]:
        """Its files, in order.

        Raises:
            DataError: there are none.
        """
        return find_files(self.path)

    @property
    def identity(self) -> list[Any]:
        """What decides its rows beside the content of its files: of a dataset, the split."""
        if not self.path.startswith(HF):
            return []
        dataset = load_hf(self.path)
        return [self.path, len(dataset), dataset._fingerprint]

    def reader(self, data: DataConfig, rows: str) -> Reader:
        """Reads its rows.

        Raises:
            DataError, ConfigError: the rows are not written in a format that `rows` accepts.
        """
        accepts = ACCEPTS[rows] | ({Format.preference} if self.converts else set())
        return Reader(self.path, format=data.format, columns=data.columns, accepts=accepts)


def file_sets(data: DataConfig, rows: str, *, only_heldout: bool = False) -> list[FileSet]:
    """The sources in their order, then the held-out rows where they have files of their own.

    Args:
        data: what to read.
        rows: what the objective reads, a key of ACCEPTS.
        only_heldout: leave out the sources where the held-out rows have files of their own.

    Raises:
        ConfigError, SeveralErrors: the embedded data does not have such rows.
    """
    heldout = data.eval
    if heldout is None and data.train == EMBEDDED and not data.sources:
        heldout = EMBEDDED
    found: list[tuple[str, str, str, str]] = []
    if not (only_heldout and heldout is not None):
        if data.sources:
            found = [
                (name, "train", f"data.sources.{name}.path", source.path)
                for name, source in data.sources.items()
            ]
        else:
            found = [("train", "train", "data.train", data.train)]
    if heldout is not None:
        found.append(("eval", "eval", "data.eval" if data.eval else "data.train", heldout))
    problems: list[PosttrainError] = []
    sets = []
    for name, split, key, path in found:
        if path == EMBEDDED and rows == "text":
            problems.append(
                ConfigError(
                    "the embedded data holds conversations and preferences, and this objective "
                    f"reads {rows} rows",
                    where=key,
                    fix='give a JSONL file with rows such as {"text": "..."}, or set objective=sft',
                )
            )
            continue
        converts = rows in CONVERTS and (data.convert_pairs or path == EMBEDDED)
        if path == EMBEDDED:
            side = "train" if split == "train" else "heldout"
            path = str(split_path(f"preferences_{side}" if rows in ANSWERS else side))
        sets.append(FileSet(name, split, key, path, converts))
    raise_all(_once(problems))
    return sets


def _once(problems: list[PosttrainError]) -> list[PosttrainError]:
    """The embedded data stands for both splits: one word about it is enough."""
    return list({str(problem): problem for problem in problems}.values())
