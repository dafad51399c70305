"""What of an objective a plan depends on."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from posttrain_dist.config import RunConfig
from posttrain_dist.config.reference_rules import chosen_reference, is_start
from posttrain_dist.flow import By
from posttrain_dist.objectives.reference_choice import OLD_LOGPROB, Reference, Referenced

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
        name: of it, as its metrics have it.
        compares: whether its rows are units: a prompt, and answers that follow it.
        model_fields: numbers of each target that a model fills before the step.
        no_dropout: dropout is switched off.
        reference: how the log-probabilities of the reference are had; None: there are none.
        reference_model: a model folder; None: the reference is what training starts with.
        old_logprob: the policy's own are made before the update, too.
    """

    name: str = "sft"
    head: HeadKind = HeadKind.loss
    compares: bool = False
    model_fields: int = 0
    no_dropout: bool = False
    reference: Reference | None = None
    reference_model: str | None = None
    old_logprob: bool = False

    @classmethod
    def of(cls, config: RunConfig) -> ObjectiveFacts:
        """Of a completed config."""
        objective = config.objective
        compares = objective.rows not in _OF_TEXT
        head = HeadKind.logprob if compares else HeadKind.loss
        fields = [each for each in objective.extra if each.by is By.model]
        reference, named = None, None
        if isinstance(objective, Referenced):
            reference = chosen_reference(config)
            named = None if is_start(config) else objective.reference_model
        return cls(
            name=objective.name,
            head=HeadKind.score if objective.own_rows else head,
            compares=compares,
            model_fields=len(fields),
            no_dropout=objective.no_dropout,
            reference=reference,
            reference_model=named,
            old_logprob=OLD_LOGPROB in fields,
        )

    @property
    def precomputes(self) -> bool:
        """Whether the reference's are made in a pass over the samples before step 1."""
        return self.reference is Reference.precomputed

    @property
    def policy_passes(self) -> int:
        """Forwards of the policy's own weights without gradients, of each micro-batch."""
        return (self.reference is Reference.adapter_off) + self.old_logprob

    @property
    def has_second_model(self) -> bool:
        """Whether a second model is on the device: for the whole run, or for the pass before it."""
        return self.reference is Reference.frozen or self.reference_model is not None
