"""`optimizer.lr=logrange(1e-5,1e-3,5)`: that many values in equal ratios, ends included.

Hydra's grammar has no such function, so that the word is written out before Hydra reads it.
"""

from __future__ import annotations

import math
import re

from posttrain_dist.errors import ConfigError

MOST_VALUES = 1000
_WORD = re.compile(r"(?P<key>[^=]+)=\s*logrange\((?P<inside>.*)\)\s*")
_FIX = "write logrange(<first>,<last>,<how many values>), such as logrange(1e-5,1e-3,5)"


def write_out_log_range(word: str) -> str:
    """An override with its `logrange(first,last,count)` written out; any other word as it is.

    Raises:
        ConfigError: what stands in the parentheses is no range.
    """
    found = _WORD.fullmatch(word)
    if found is None:
        return word
    key = found["key"]
    try:
        first, last, count = _read(found["inside"])
    except ValueError:
        raise ConfigError(
            f"logrange({found['inside']}) is not two numbers and a count", where=key, fix=_FIX
        ) from None
    if not (0 < first < math.inf and 0 < last < math.inf and first != last):
        what = f"the ends of logrange are {first:g} and {last:g}"
        fix = "give two different numbers above 0"
        raise ConfigError(what, where=key, fix=fix)
    if not 2 <= count <= MOST_VALUES:
        what = f"logrange is to give {count} values"
        raise ConfigError(what, where=key, fix=f"give a count from 2 to {MOST_VALUES}")
    return f"{key}={','.join(log_range(first, last, count))}"


def log_range(first: float, last: float, count: int) -> list[str]:
    """`count` values from `first` to `last` in equal ratios, in four digits, the ends as given."""
    steps = range(1, count - 1)
    ratio = math.log(last / first) / (count - 1)
    return [f"{first:g}", *(f"{first * math.exp(ratio * i):.4g}" for i in steps), f"{last:g}"]


def _read(inside: str) -> tuple[float, float, int]:
    first, last, count = inside.split(",")
    return float(first), float(last), int(count)
