"""Made histories for the tests of the rules; tests/ is no package, so they load this by path."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

from posttrain_dist.diagnosis.alarms import Alarm


def training(
    loss: Callable[[int], float],
    count: int,
    noise: float = 0.1,
    seed: int = 0,
    **more: Callable[[int], float],
) -> list[dict]:
    """Rows 1 to `count`; noise is relative; `more` are metrics whose name has `__` for `/`."""
    draw = random.Random(seed)
    rows = []
    for step in range(1, count + 1):
        row = {
            "step": step,
            "train/loss": loss(step) * (1 + noise * draw.gauss(0, 1)),
            "train/grad_norm": 1 + 0.2 * draw.random(),
            "train/lr": 1e-4 * min(1, step / 20),
            "train/tokens_per_s": 5000.0,
        }
        row |= {name.replace("__", "/"): value(step) for name, value in more.items()}
        rows.append(row)
    return rows


def with_evals(rows: list[dict], every: int, **held_out: Callable[[int], float]) -> list[dict]:
    """The rows with held-out losses, at step 0 and every `every` steps."""

    def of(step: int) -> dict[str, float]:
        return {name.replace("__", "/"): value(step) for name, value in held_out.items()}

    rows = [row | of(row["step"]) if row["step"] % every == 0 else row for row in rows]
    return [{"step": 0, **of(0)}, *rows]


def falling(start: float, end: float, pace: float = 40) -> Callable[[int], float]:
    return lambda step: end + (start - end) * math.exp(-step / pace)


def flat(value: float) -> Callable[[int], float]:
    return lambda step: value


def only(rule: str, alarms: list[Alarm]) -> list[Alarm]:
    return [alarm for alarm in alarms if alarm.rule == rule]


def bowl(best: int, floor: float, rise: float) -> Callable[[int], float]:
    """Falls to `floor` at step `best`, then rises by `rise` a step."""
    return lambda s: floor + 0.004 * (best - s) if s <= best else floor + rise * (s - best)
