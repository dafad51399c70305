"""What of an objective a plan depends on."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from posttrain_dist.flow import By
from posttrain_dist.objectives.base import Objective

_OF_TEXT = ("messages", "text")


class HeadKind(StrEnum):
    """What the head computes."""

    loss = "loss"  # fused, with its gradients in the forward
    logprob = "log-probabilities"  # whose gradients are known in backward only
    score = "score"  # one number for each target, by a head of one row


@dataclass(frozen=True, slots=True)
class ObjectiveFacts:
    """Of one objective.

    Attributes:
        compares: whether its rows are units: a prompt, and answers that follow it.
        model_fields: numbers of each target that a model fills before the step.
    """

    head: HeadKind = HeadKind.loss
    compares: bool = False
    model_fields: int = 0
    no_dropout: bool = False

    @classmethod
    def of(cls, objective: Objective) -> ObjectiveFacts:
        """Of the slot `objective` of a config."""
        compares = objective.rows not in _OF_TEXT
        head = HeadKind.logprob if compares else HeadKind.loss
        fields = sum(each.by is By.model and each.name.endswith("_N") for each in objective.extra)
        return cls(
            HeadKind.score if objective.own_rows else head, compares, fields, objective.no_dropout
        )
