"""Results of sweeps as plain data, made from a closed form."""

from __future__ import annotations

import itertools
import math
from typing import Any

CHANNELS = {"chat": 0.9, "maths": 1.2, "code": 0.6}
KEYS = ["tuning.rank", "optimizer.lr", "tuning.dropout"]
STEPS = (0, 20, 40, 60, 80, 100)


def final_loss(rank: float, lr: float, dropout: float) -> float:
    """Best, and 1, at rank 16, lr 3e-4 and no dropout."""
    away = math.log10(lr / 3e-4) ** 2 + math.log2(rank / 16) ** 2 / 8 + dropout
    return 1 + 0.4 * away


def made_trial(number: int, rank: str, lr: str, dropout: str) -> dict[str, Any]:
    last = final_loss(float(rank), float(lr), float(dropout))
    is_pruned = last > 1.5
    steps = STEPS[:3] if is_pruned else STEPS
    curve = [[step, last + (3 - last) * (1 - step / 100) ** 3] for step in steps]
    varied = dict(zip(KEYS, (rank, lr, dropout), strict=True))
    curves = {"eval/loss": curve}
    for name, scale in CHANNELS.items():
        curves[f"eval_channel_loss/{name}"] = [[step, scale * value] for step, value in curve]
    return {
        "number": number,
        "overrides": [f"{key}={text}" for key, text in varied.items()],
        "varied": varied,
        "state": "pruned" if is_pruned else "done",
        "error": None,
        "value": curve[-1][1],
        "step": steps[-1],
        "total_steps": STEPS[-1],
        "seconds": 12.0 * steps[-1],
        "workers": 2,
        "cost_s": 24.0 * steps[-1],
        "memory_bytes": int(float(rank) * 2**28) + 2**33,
        "curves": curves,
        "folder": f"outputs/mini/sweeps/20261130-090000/trial-{number:03d}",
        "extra": {},
    }


def made_sweep(
    ranks: tuple[str, ...] = ("4", "8", "16", "32", "64"),
    rates: tuple[str, ...] = ("3e-5", "1e-4", "3e-4", "1e-3", "3e-3"),
    dropouts: tuple[str, ...] = ("0", "0.1"),
) -> dict[str, Any]:
    """A grid, the best trial first, and one more that failed."""
    grid = itertools.product(ranks, rates, dropouts)
    trials = [made_trial(number, *values) for number, values in enumerate(grid)]
    trials.sort(key=lambda trial: trial["value"])
    failed = made_trial(len(trials), ranks[-1], rates[-1], dropouts[-1])
    failed |= {"state": "failed", "value": None, "step": None, "cost_s": 0, "memory_bytes": None}
    failed |= {"curves": {}, "error": "optimizer.lr: the loss is not a number at step 3"}
    best = trials[0]
    return {
        "name": "mini-20261130-090000",
        "folder": "outputs/mini/sweeps/20261130-090000",
        "command": "posttrain train -m tuning=lora tuning.rank=4,8,16,32,64 …",
        "created": "2026-11-30T09:00:00+00:00",
        "metric": "eval/loss",
        "direction": "minimize",
        "keys": KEYS,
        "unit": "GPU",
        "best": best["number"],
        "winner": f"posttrain train tuning=lora {' '.join(best['overrides'])}",
        "trials": [*trials, failed],
    }
