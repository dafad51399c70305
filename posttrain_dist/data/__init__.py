"""From files to batches: read, render, mask, pack, collate.

records -> template + masking -> packing -> collate -> loader
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import Enum

from posttrain_dist.errors import Rule, at_least

__all__ = ["DataConfig", "Format", "LongRows", "MixBy", "OnBadRow", "Policy", "Source", "Template"]


class Format(Enum):
    """How a row is written; docs/data.md shows each."""

    auto = "auto"  # recognised from the first rows
    messages = "messages"
    sharegpt = "sharegpt"
    alpaca = "alpaca"
    prompt_completion = "prompt_completion"
    text = "text"
    tokens = "tokens"
    preference = "preference"
    prompt = "prompt"


class OnBadRow(Enum):
    """What becomes of a row that cannot be used."""

    error = "error"
    skip = "skip"  # left out and counted


class LongRows(Enum):
    """What becomes of a row above `data.max_length` tokens."""

    truncate = "truncate"
    split = "split"  # into several samples
    drop = "drop"


class MixBy(Enum):
    """What the weights of sources are shares of."""

    rows = "rows"
    tokens = "tokens"  # supervised ones


@dataclass(kw_only=True, slots=True)
class Source:
    """One of several weighted sources; they can be given in YAML only."""

    path: str = "???"
    weight: float = 1.0  # its share is weight / sum of weights
    max_passes: float | None = None  # times that a row is drawn in an epoch at most
    # Other weights from a step on: {0: 1.0, 500: 0.2}; empty: `weight` throughout.
    schedule: dict[int, float] = field(default_factory=dict)


@dataclass(kw_only=True, slots=True)
class DataConfig:
    """What to train on and how it is cut."""

    # A file, folder or glob; `embedded` is the data set that comes with the package.
    train: str = "embedded"
    sources: dict[str, Source] = field(default_factory=dict)  # instead of `train`: name -> source
    mix_by: MixBy = MixBy.rows
    # The same as `train` for held-out rows; null: a share of the training rows (`embedded` has
    # its own).
    eval: str | None = None
    eval_fraction: float = 0.05  # share of training rows held out when `eval` is null
    format: Format = Format.auto
    columns: dict[str, str] = field(default_factory=dict)  # our name -> the name in the files
    on_bad_row: OnBadRow = OnBadRow.error
    max_length: int = 2048  # tokens a pack at most
    long_rows: LongRows = LongRows.truncate
    pack_window: int = 4096  # samples that packing may reorder among themselves
    workers: int | None = None  # processes that tokenise; null: one a core
    cache: str | None = None  # folder of prepared data; null: posttrain/ in the user's cache


class Policy(Enum):
    """Which messages are supervised where a row does not say so itself."""

    assistant = "assistant"  # every assistant turn
    last_turn = "last_turn"  # the last assistant turn
    all = "all"  # every message but the results of tools


@dataclass(kw_only=True, slots=True)
class Template:
    """The group `template`: how a conversation becomes text, and what of it is learned."""

    name: str = "tokenizer"  # the tokenizer's own; or one of data/templates; or a .jinja file
    policy: Policy = Policy.assistant
    explode_turns: bool = False  # one sample for each assistant turn
    strict: bool = True  # a failed check stops; false: it is reported


def data_rules(data: DataConfig) -> list[Rule]:
    """What must hold among the values of the group `data`."""
    rules = [
        at_least("data.max_length", data.max_length, 2),
        at_least("data.pack_window", data.pack_window),
        at_least("data.workers", data.workers),
        Rule(
            0 <= data.eval_fraction < 1,
            "data.eval_fraction",
            f"is {data.eval_fraction}, must be in [0, 1)",
            "set a share such as 0.05",
        ),
        Rule(
            not data.sources or data.train == DataConfig().train,
            "data.sources",
            "is set together with data.train",
            "give all training rows as sources, or none",
        ),
        Rule(
            not data.sources or any(source.weight > 0 for source in data.sources.values()),
            "data.sources",
            "holds no source of a weight above 0",
            "give at least one source a weight",
        ),
        Rule(
            "eval" not in data.sources,
            "data.sources.eval",
            "is a reserved name",
            "rename it",
        ),
    ]
    for name, source in data.sources.items():
        key = f"data.sources.{name}"
        weights = {"weight": source.weight}
        weights |= {f"schedule.{step}": weight for step, weight in source.schedule.items()}
        rules += [
            Rule(
                0 <= weight < math.inf,
                f"{key}.{place}",
                f"is {weight}, must be 0 or more, and finite",
                "set a weight such as 1.0",
            )
            for place, weight in weights.items()
        ]
        rules.append(
            Rule(
                source.max_passes is None or source.max_passes > 0,
                f"{key}.max_passes",
                f"is {source.max_passes}, must be above 0",
                "set how often a row may be drawn in an epoch, or null",
            )
        )
    return rules
