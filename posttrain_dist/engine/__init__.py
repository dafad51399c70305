"""Engines run the model and hold its optimizer state; one interface, single or sharded."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from posttrain_dist.errors import Rule, at_least

WARMUP_RATIO = 0.03  # where neither warmup_ratio nor warmup_steps is set

__all__ = [
    "WARMUP_RATIO",
    "AdamW",
    "AutoEngine",
    "DeepSpeed",
    "Engine",
    "Optimizer",
    "Schedule",
    "Single",
    "engine_rules",
    "optimizer_engine_rule",
    "optimizer_rules",
]


@dataclass(kw_only=True, slots=True)
class Engine:
    """The slot `engine`: one of the options below."""


@dataclass(kw_only=True, slots=True)
class Single(Engine):
    """Plain torch in one process; the yardstick that the other engines are tested against."""


@dataclass(kw_only=True, slots=True)
class DeepSpeed(Engine):
    """DeepSpeed ZeRO (Rajbhandari et al. 2020): shards state over the data-parallel ranks."""

    stage: int = 0  # 0 none, 1 optimizer state, 2 and gradients, 3 and parameters
    offload: bool = False  # optimizer state and, at stage 3, parameters in CPU memory
    # Parameters with fewer elements stay whole on every rank at stage 3.
    persistence_threshold: int = 100_000
    # A DeepSpeed JSON of your own, merged in; keys that the run itself sets are refused.
    config: str | None = None


@dataclass(kw_only=True, slots=True)
class AutoEngine(Engine):
    """The planner takes the first that fits, before anything starts: single, or ZeRO 1 to 3."""


class Schedule(Enum):
    """Learning rate after warm-up."""

    cosine = "cosine"
    linear = "linear"
    constant = "constant"


@dataclass(kw_only=True, slots=True)
class Optimizer:
    """The slot `optimizer`: one of the options below."""


@dataclass(kw_only=True, slots=True)
class AdamW(Optimizer):
    """AdamW (Loshchilov & Hutter 2019)."""

    lr: float | None = None  # peak learning rate; null: that of the tuning
    # With tuning=auto: the tuning that `lr` is meant for (full, lora); others take their own.
    lr_for: str = "full"
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.0  # on matrices only: never on norms and biases
    clip: float = 1.0  # largest global gradient norm; 0: no clipping
    schedule: Schedule = Schedule.cosine
    # Share of all steps in which lr rises from 0; null: 0.03, unless warmup_steps is set.
    warmup_ratio: float | None = None
    warmup_steps: int | None = None  # the same as a number of steps; one of the two can be set
    min_lr_ratio: float = 0.1  # lr at the last step, as a share of the peak
    # Bits of each number of the moments: 32, or 8 in blocks (Dettmers et al., arXiv:2110.02861).
    # 8 saves 6 bytes a trained parameter; the float32 master of 16-bit weights stays.
    state_bits: int = 32
    paged: bool = False  # moments move to host memory when the GPU is full; on a CPU nothing does


def engine_rules(engine: Engine) -> list[Rule]:
    """What must hold among the values of the group `engine`."""
    if not isinstance(engine, DeepSpeed):
        return []
    return [
        Rule(
            engine.stage in (0, 1, 2, 3),
            "engine.stage",
            f"is {engine.stage}",
            "use engine=zero0, zero1, zero2 or zero3",
        ),
        Rule(
            not engine.offload or engine.stage >= 1,
            "engine.offload",
            "needs a sharded optimizer, and engine.stage is 0",
            "use engine=zero3_offload, or engine.stage=1, 2 or 3",
        ),
        at_least("engine.persistence_threshold", engine.persistence_threshold, 0),
    ]


def optimizer_rules(optimizer: Optimizer) -> list[Rule]:
    """What must hold among the values of the group `optimizer`."""
    if not isinstance(optimizer, AdamW):
        return []
    ranges = {
        "lr": (optimizer.lr is None or 0 < optimizer.lr < 10, "above 0 and below 10"),
        "beta1": (0 <= optimizer.beta1 < 1, "in [0, 1)"),
        "beta2": (0 <= optimizer.beta2 < 1, "in [0, 1)"),
        "eps": (0 < optimizer.eps < 1, "above 0 and below 1"),
        "weight_decay": (0 <= optimizer.weight_decay <= 1000, "in [0, 1000]"),
        "clip": (0 <= optimizer.clip <= 1e9, "in [0, 1e9], 0 being no clipping"),
        "warmup_ratio": (0 <= (optimizer.warmup_ratio or 0) <= 1, "in [0, 1]"),
        "min_lr_ratio": (0 <= optimizer.min_lr_ratio <= 1, "in [0, 1]"),
    }
    both = optimizer.warmup_steps is not None and optimizer.warmup_ratio is not None
    return [
        at_least("optimizer.warmup_steps", optimizer.warmup_steps, 0),
        Rule(
            optimizer.state_bits in (8, 32),
            "optimizer.state_bits",
            f"is {optimizer.state_bits}, must be 8 or 32",
            "use optimizer=adamw or optimizer=adamw_8bit",
        ),
        Rule(
            optimizer.lr_for in ("full", "lora"),
            "optimizer.lr_for",
            f"is {optimizer.lr_for}, must be full or lora",
            "set it to the tuning that optimizer.lr is meant for; lora is qlora's too",
        ),
        Rule(
            not both,
            "optimizer.warmup_steps",
            f"is {optimizer.warmup_steps}, and optimizer.warmup_ratio is {optimizer.warmup_ratio}",
            "set one of the two, and the other to null",
        ),
        *_ranges(optimizer, ranges),
    ]


def optimizer_engine_rule(optimizer: Optimizer, engine: Engine) -> Rule:
    """Moments of 8 bits and paged ones are those of the single engine."""
    key, value = "optimizer.paged", "true"
    if isinstance(optimizer, AdamW) and optimizer.state_bits != 32:
        key, value = "optimizer.state_bits", str(optimizer.state_bits)
    plain = not isinstance(optimizer, AdamW) or (optimizer.state_bits == 32 and not optimizer.paged)
    return Rule(
        plain or not isinstance(engine, DeepSpeed),
        key,
        f"is {value} under DeepSpeed, which lays the parameters end to end and keeps and shards "
        "float32 moments of that: blocks of 8 bits and pages would be of other places",
        "use optimizer=adamw, or engine=single with one worker",
    )


def _ranges(optimizer: AdamW, ranges: dict[str, tuple[bool, str]]) -> list[Rule]:
    return [
        Rule(
            ok,
            f"optimizer.{name}",
            f"is {getattr(optimizer, name)}, must be {wanted}",
            f"set optimizer.{name} to a value {wanted}",
        )
        for name, (ok, wanted) in ranges.items()
    ]
