"""The groups of the configuration that belong to no package: the loop, held-out evaluation.

Imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from posttrain_dist.data import MAX_PASSES
from posttrain_dist.errors import Rule, at_least

MAX_BATCH = 10**6  # packs of a step, which are drawn at once


class Dtype(Enum):
    """Number format of weights and activations; optimizer state is always float32."""

    auto = "auto"  # bfloat16 where the hardware multiplies it fast, else float32
    bfloat16 = "bfloat16"
    float32 = "float32"


@dataclass(kw_only=True, slots=True)
class TrainConfig:
    """The loop."""

    steps: int | None = None  # optimizer steps; null: from `epochs` or `tokens`
    epochs: float | None = None  # passes over the data; null: 1 if `steps` is null too
    tokens: int | None = None  # tokens of the whole run; null: no such budget
    batch_size: int = 8  # packs per optimizer step, over all ranks
    micro_batch_size: int = 1  # packs per forward per rank
    dtype: Dtype = Dtype.auto
    # Noise on the embeddings while training (Jain et al., arXiv:2310.05914), such as 5; 0: none.
    neftune_alpha: float = 0.0
    log_every: int = 1  # steps between lines of metrics.jsonl
    eval_every: int | None = None  # steps; null: before training and at its end only
    save_every: int | None = None  # steps; null: at the end only
    # Before step 1 the heaviest micro-batch, an update and a save are tried, and undone; null: with
    # tuning=auto or engine=auto.
    rehearse: bool | None = None
    resume: str = "auto"  # auto: newest checkpoint of the run folder; never; or a checkpoint


@dataclass(kw_only=True, slots=True)
class EvalConfig:
    """Held-out evaluation."""

    generate_rows: int = 0  # checkable rows per channel answered by generation, before and after
    samples: int = 3  # generated answers that are shown, of channels without one right answer
    max_new_tokens: int = 32


def train_rules(train: TrainConfig) -> list[Rule]:
    """What must hold among the values of the group `train`."""
    return [
        at_least("train.steps", train.steps),
        at_least("train.tokens", train.tokens),
        at_least("train.batch_size", train.batch_size, 1, MAX_BATCH),
        at_least("train.neftune_alpha", train.neftune_alpha, 0, 10**6),
        at_least("train.micro_batch_size", train.micro_batch_size, 1, MAX_BATCH),
        at_least("train.log_every", train.log_every),
        at_least("train.eval_every", train.eval_every),
        at_least("train.save_every", train.save_every),
        Rule(
            train.epochs is None or 0 < train.epochs <= MAX_PASSES,
            "train.epochs",
            f"is {train.epochs}, must be above 0 and at most {MAX_PASSES:,}",
            "set a number of passes over the data, such as 3",
        ),
        Rule(
            [train.steps, train.epochs, train.tokens].count(None) >= 2,
            "train.steps",
            "is set together with train.epochs or train.tokens",
            "set one of the three",
        ),
    ]


def eval_rules(evaluation: EvalConfig) -> list[Rule]:
    """What must hold among the values of the group `eval`."""
    return [
        at_least("eval.max_new_tokens", evaluation.max_new_tokens, 1, 10**6),
        at_least("eval.generate_rows", evaluation.generate_rows, 0),
        at_least("eval.samples", evaluation.samples, 0, 10**6),
        Rule(
            evaluation.generate_rows <= 256,
            "eval.generate_rows",
            f"is {evaluation.generate_rows}: of each channel 256 held-out rows are kept as text",
            "set eval.generate_rows to 256 or less",
        ),
    ]
