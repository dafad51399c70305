"""LoRA (Hu et al., arXiv:2106.09685) and its family: low-rank matrices beside frozen weights."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any, ClassVar

from posttrain_dist.errors import Rule, at_least
from posttrain_dist.tuning.base import AdapterTuning, above_zero, names_rule


class LoraInit(Enum):
    """What A and B begin with."""

    zero_b = "zero_b"  # A random, B zero: the base model, bit for bit
    pissa = "pissa"  # the largest singular vectors (Meng et al., arXiv:2404.02948)


@dataclass(kw_only=True, slots=True)
class Lora(AdapterTuning):
    """W x + scale · B A x, with W frozen; scale = alpha / rank, or alpha / sqrt(rank)."""

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0  # of the input of A
    # all-linear (without the head), attention, mlp, a list of names, or a regular expression of
    # whole module names.
    targets: Any = "all-linear"
    rslora: bool = False  # scale by 1 / sqrt(rank) (Kalajdzievski, arXiv:2312.03732)
    dora: bool = False  # magnitude and direction apart (Liu et al., arXiv:2402.09353)
    init: LoraInit = LoraInit.zero_b
    lr_ratio_b: float = 1.0  # LoRA+: learning rate of B over that of A (arXiv:2402.12354)
    freeze_a: bool = False  # LoRA-FA: only B is trained (Zhang et al., arXiv:2308.03303)
    modules_to_save: list[str] = field(default_factory=list)  # trained in full beside it, by name

    marks: ClassVar[tuple[str, ...]] = (
        "lora_A",
        "lora_B",
        "lora_magnitude_vector",
        "modules_to_save",
        "trainable_tokens_delta",
    )

    def rules(self) -> list[Rule]:
        """Ranges; the sizes of the model are compared when it is there."""
        return [
            at_least("tuning.rank", self.rank, 1, 10**6),
            above_zero("tuning.alpha", self.alpha, 10**6),
            above_zero("tuning.lr_ratio_b", self.lr_ratio_b, 10**6),
            Rule(
                0 <= self.dropout < 1,
                "tuning.dropout",
                f"is {self.dropout}, must be in [0, 1)",
                "set it to 0, or for instance 0.05",
            ),
            names_rule("tuning.targets", self.targets),
        ]
