"""The values that vary over a sweep as places on an axis: of heat map and parallel lines."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

MOST_VALUES = 9  # of an axis; more numbers than this are put into bins
NUM_BINS = 6
MOST_LETTERS = 8  # of a number that a search made up
LOG_RATIO = 20.0  # an axis whose last number is more times its first one is logarithmic


@dataclass(frozen=True, slots=True)
class Axis:
    """One key that varies, with a label for each place."""

    key: str
    labels: tuple[str, ...]
    places: Mapping[str, int]  # text of a value -> index of its label
    shares: Mapping[str, float]  # text of a value -> where it lies, 0 to 1


def axis_of(key: str, texts: Sequence[str]) -> Axis:
    """The axis of a key: numbers ascend, other values stand in the order in which they come."""
    values = list(dict.fromkeys(texts))
    numbers = {text: number for text in values if (number := _number(text)) is not None}
    if len(numbers) < len(values):
        places = {text: i for i, text in enumerate(values)}
        return Axis(key, tuple(values), places, _even(values))
    values.sort(key=numbers.__getitem__)
    low, high = numbers[values[0]], numbers[values[-1]]
    is_log = low > 0 and high / low > LOG_RATIO
    scaled = {text: math.log(n) if is_log else n for text, n in numbers.items()}
    first, width = scaled[values[0]], (scaled[values[-1]] - scaled[values[0]]) or 1.0
    shares = {text: (scaled[text] - first) / width for text in values}
    if len(values) <= MOST_VALUES:
        places = {text: i for i, text in enumerate(values)}
        return Axis(key, _labels(values, numbers), places, _even(values))
    edges = [first + width * i / NUM_BINS for i in range(NUM_BINS + 1)]
    shown = [f"{math.exp(edge) if is_log else edge:.2g}" for edge in edges]
    labels = tuple(f"{shown[i]} to {shown[i + 1]}" for i in range(NUM_BINS))
    places = {text: min(int(share * NUM_BINS), NUM_BINS - 1) for text, share in shares.items()}
    return Axis(key, labels, places, shares)


def _labels(values: Sequence[str], numbers: Mapping[str, float]) -> tuple[str, ...]:
    """The values; where one is long, all in three digits, if that leaves them apart."""
    short = [f"{numbers[text]:.3g}" for text in values]
    is_short = max(map(len, values)) <= MOST_LETTERS or len(set(short)) < len(short)
    return tuple(values if is_short else short)


def _even(values: Sequence[str]) -> dict[str, float]:
    """Values at equal distances."""
    last = max(len(values) - 1, 1)
    return {text: i / last if len(values) > 1 else 0.5 for i, text in enumerate(values)}


def _number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def short_key(key: str, keys: Sequence[str]) -> str:
    """The last part of a key, where no other key ends alike."""
    leaf = key.rsplit(".", 1)[-1]
    return leaf if sum(other.rsplit(".", 1)[-1] == leaf for other in keys) == 1 else key


def axes_of(data: Mapping[str, Any]) -> list[Axis]:
    """An axis for each key with several values, as the data orders them."""
    found = []
    for key in data["keys"]:
        texts = [str(t["varied"][key]) for t in data["trials"] if key in t["varied"]]
        if len(set(texts)) > 1:
            found.append(axis_of(key, texts))
    return found


def ordered_places(values: Mapping[int, float], direction: str) -> dict[int, float]:
    """How good each trial is among the others: 1 the best, 0 the worst, equal ones alike."""
    sign = -1 if direction == "maximize" else 1
    distinct = sorted({sign * value for value in values.values()})
    last = max(len(distinct) - 1, 1)
    place = {value: 1 - i / last for i, value in enumerate(distinct)}
    return {number: place[sign * value] for number, value in values.items()}


def values_of(data: Mapping[str, Any]) -> dict[int, float]:
    """The metric of each trial that has one, by number."""
    return {t["number"]: float(t["value"]) for t in data["trials"] if t["value"] is not None}
