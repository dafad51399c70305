"""What preparing the data found, channel by channel."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from posttrain_dist.errors import DataError

# Fields of `Counts` that only rows with answers have.
OF_ANSWERS = ("comparisons", "better", "better_tokens", "worse", "worse_tokens")


@dataclass(slots=True)
class Counts:
    """What became of the rows of one channel in one split."""

    rows: int = 0  # as read
    samples: int = 0  # kept; more than rows where turns or long rows are split
    tokens: int = 0  # of the samples, after cutting
    supervised: int = 0  # tokens with a weight
    truncated: int = 0  # rows cut to data.max_length
    dropped: int = 0  # rows left without a supervised token by the cut
    duplicates: int = 0  # rows whose content stood in a row before
    near_duplicates: int = 0  # rows that are much like a row before
    lengths: list[list[int]] = field(default_factory=list)  # [tokens at most, samples]
    # Of rows with answers. Better and worse: of each comparison its two answers; of single ones
    # with a label those that are desirable, and the others.
    comparisons: int = 0
    better: int = 0  # answers
    better_tokens: int = 0
    worse: int = 0
    worse_tokens: int = 0


@dataclass(slots=True)
class Summary:
    """What `prepare` found and wrote."""

    channels: list[str]  # sorted; Example.channel is an index into them
    splits: dict[str, dict[str, Counts]]  # "train", "eval" -> channel -> counts
    duplicates_moved: int  # held-out rows that also stand in train, and are kept there only
    near_leaks: int  # held-out rows that are much like a row of train
    rejected: int  # rows that could not be used
    longest: int  # tokens of the longest sample
    largest_id: int  # the largest token
    special_tokens: dict[int, str]  # id -> name, of those with a loss of their own; ids ascending
    end_token_ids: list[int]  # that supervised turns end with, the most common one first
    inputs: dict[str, Any]  # settings and SHA-256 digests of everything that went in

    @classmethod
    def read(cls, folder: Path) -> Summary:
        """The summary of a prepared folder.

        Raises:
            DataError: the folder was written by another version, or is damaged.
        """
        try:
            values = json.loads((folder / "summary.json").read_bytes())
            splits = {
                split: {channel: Counts(**counts) for channel, counts in channels.items()}
                for split, channels in values.pop("splits").items()
            }
            if "end_token_id" in values:  # of an earlier version: a run goes on with its own data
                end = values.pop("end_token_id")
                values["end_token_ids"] = [] if end is None else [end]
            names = {int(token): name for token, name in values.pop("special_tokens").items()}
            found = cls(splits=splits, special_tokens=names, **values)
            for name in ("rejected", "longest", "largest_id"):
                if not isinstance(getattr(found, name), int):
                    raise TypeError(f"{name} is no whole number")
            return found
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"the summary of the prepared data cannot be read: {error}",
                where=str(folder / "summary.json"),
                fix=f"delete {folder}: the data is then prepared again",
            ) from error
