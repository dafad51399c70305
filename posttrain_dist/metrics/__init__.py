"""Numbers of a run: sums per channel, throughput, and the sinks that they go to."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

__all__ = ["LoggingConfig", "WandbMode"]


class WandbMode(Enum):
    """Where W&B writes."""

    auto = "auto"  # WANDB_MODE, else online if WANDB_API_KEY or netrc holds a key, else offline
    offline = "offline"
    online = "online"
    off = "off"


@dataclass(kw_only=True, slots=True)
class LoggingConfig:
    """Sinks beside metrics.jsonl, which is always written."""

    wandb: WandbMode = WandbMode.auto
    project: str = "posttrain"  # W&B project
    entity: str | None = None  # W&B team or user; null: the key's default
    group: str | None = None  # W&B group of this run; null: none, or of a trial its sweep
