"""What is searched: the values of Hydra's override syntax, as plain values for sweep.json.

optimizer.lr=tag(log, interval(1e-5,1e-3))   a number, every ratio as likely
tuning.dropout=interval(0,0.1)               a number; whole where its key takes whole ones
tuning.rank=range(8,65,step=8)               numbers in steps, the last one left out
tuning.rank=8,16,32   or   choice(8,16,32)   one of a list
"""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep

from posttrain_dist.config import SLOTS, RunConfig
from posttrain_dist.errors import ConfigError, raise_all

MOST_COMBINATIONS = 100_000  # of a finite space that is listed


@dataclass(frozen=True, slots=True)
class Dimension:
    """One override that is searched."""

    key: str  # as on the left of the override's `=`
    kind: Literal["choice", "int", "float"]
    values: tuple[str, ...] = ()  # of a choice, as Hydra writes them
    low: float = 0.0
    high: float = 0.0  # included
    step: float | None = None  # None: any number between
    log: bool = False

    @property
    def size(self) -> float:
        """How many values there are; math.inf for any number between."""
        if self.kind == "choice":
            return len(self.values)
        if self.kind == "int" or self.step is not None:
            return math.floor((self.high - self.low) / (self.step or 1) + 1e-9) + 1
        return math.inf

    def all_values(self) -> list[Any]:
        """Every value of a finite one."""
        if self.kind == "choice":
            return list(self.values)
        numbers = (self.low + i * (self.step or 1) for i in range(int(self.size)))
        return [int(n) if self.kind == "int" else n for n in numbers]

    def override(self, value: Any) -> str:
        """The override of one value: of a number between two, six digits are enough."""
        if self.kind == "float":
            short = f"{value:.6g}"
            value = short if self.low <= float(short) <= self.high else repr(float(value))
        return f"{self.key}={value}"


@dataclass(frozen=True, slots=True)
class Space:
    """The overrides of a search in the order in which they were typed: texts, and dimensions."""

    parts: tuple[str | Dimension, ...]

    @property
    def dimensions(self) -> list[Dimension]:
        """What is searched."""
        return [part for part in self.parts if isinstance(part, Dimension)]

    @property
    def size(self) -> float:
        """Number of combinations; math.inf where one has any number between."""
        return math.prod(each.size for each in self.dimensions)

    def overrides(self, values: dict[str, Any]) -> tuple[str, ...]:
        """Those of a trial with these values, by key."""
        return tuple(
            part.override(values[part.key]) if isinstance(part, Dimension) else part
            for part in self.parts
        )

    def to_plain(self) -> list[Any]:
        """As JSON has it."""
        return [
            p if isinstance(p, str) else {**asdict(p), "values": list(p.values)} for p in self.parts
        ]

    @classmethod
    def from_plain(cls, parts: Sequence[Any]) -> Space:
        """What `to_plain` gave."""
        return cls(
            tuple(
                p if isinstance(p, str) else Dimension(**{**p, "values": tuple(p["values"])})
                for p in parts
            )
        )


def read_space(overrides: Sequence[str]) -> Space:
    """The space of a command line; of two overrides of one key the later one counts.

    Raises:
        ConfigError, SeveralErrors: a range is empty or cannot be searched as it is tagged, or
            nothing is searched at all.
    """
    found: dict[str, str | Dimension] = {}
    problems = []
    for override in OverridesParser.create().parse_overrides(list(overrides)):
        key = str(override.get_key_element())
        found.pop(key, None)
        if not override.is_sweep_override():
            found[key] = str(override.input_line)
            continue
        try:
            found[key] = _dimension(key, override)
        except ConfigError as error:
            problems.append(error)
    raise_all(list(problems))
    space = Space(tuple(found.values()))
    if not space.dimensions:
        raise ConfigError(
            "has nothing to search",
            where="hydra/sweeper=posttrain_optuna",
            fix="give a key several values, such as tuning.rank=8,16,32, or "
            "'optimizer.lr=tag(log, interval(1e-5,1e-3))'",
        )
    return space


def _dimension(key: str, override: Override) -> Dimension:
    value: Any = override.value()
    name = override.key_or_group
    is_log = _is_log(name, value.tags)
    if isinstance(value, IntervalSweep):
        return _interval(key, name, value, is_log)
    if is_log:
        what = "is tagged log, which only an interval can be"
        raise ConfigError(what, where=name, fix="write tag(log, interval(1e-5,1e-3))")
    if isinstance(value, RangeSweep):
        return _range(key, name, value)
    return Dimension(key, "choice", tuple(dict.fromkeys(override.sweep_string_iterator())))


def _is_log(name: str, tags: set[str]) -> bool:
    if tags - {"log"}:
        what = f"has the tag {', '.join(sorted(tags - {'log'}))}, of which nothing is known"
        raise ConfigError(what, where=name, fix="leave it out; tag(log, interval(...)) is known")
    return "log" in tags


def _interval(key: str, name: str, value: IntervalSweep, is_log: bool) -> Dimension:
    low, high = float(value.start or 0), float(value.end or 0)
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        what = f"interval({low:g},{high:g}) is empty"
        raise ConfigError(what, where=name, fix="give the smaller number first")
    if is_log and low <= 0:
        what = f"interval({low:g},{high:g}) begins at {low:g}, of which there is no logarithm"
        raise ConfigError(what, where=name, fix="begin above 0")
    if not _takes_whole(name):
        return Dimension(key, "float", low=low, high=high, log=is_log)
    if low != int(low) or high != int(high):
        what = f"takes whole numbers, and interval({low:g},{high:g}) ends at others"
        raise ConfigError(what, where=name, fix="give whole ends")
    return Dimension(key, "int", low=int(low), high=int(high), log=is_log)


def _range(key: str, name: str, value: RangeSweep) -> Dimension:
    numbers = list(value.range())
    if len(numbers) < 2:
        what = f"{'one value' if numbers else 'no value'} is in the range"
        fix = "range(start,stop,step) leaves stop out: give one behind the last value"
        raise ConfigError(what, where=name, fix=fix)
    kind: Literal["int", "float"] = (
        "int" if all(isinstance(number, int) for number in numbers) else "float"
    )
    return Dimension(
        key,
        kind,
        low=min(numbers),
        high=max(numbers),
        step=abs(value.step),
    )


def _takes_whole(key: str) -> bool:
    """Whether a key takes whole numbers only, in every option that has it."""
    hints = list(_hints(key))
    return bool(hints) and all(
        {each for each in typing.get_args(hint) or (hint,) if each is not type(None)} == {int}
        for hint in hints
    )


def _hints(key: str) -> Iterator[Any]:
    owners: list[Any] = [RunConfig]
    *parents, leaf = key.split(".")
    for part in parents:
        named = [typing.get_type_hints(owner).get(part) for owner in owners]
        owners = list(SLOTS.get(part, {}).values()) or [
            each for each in named if dataclasses.is_dataclass(each)
        ]
    for owner in owners:
        hints = typing.get_type_hints(owner)
        if leaf in hints:
            yield hints[leaf]
