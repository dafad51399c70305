"""Which model an objective compares the policy with; its log-probabilities come with every batch.

    ref_logprob_N   log p of the reference, of each supervised token
    old_logprob_N   log p of the policy itself, before the update and without gradient

Neither is made by an objective: `posttrain_dist/reference/` fills these fields, whichever reference
is chosen, so that no objective owns a second model.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, ClassVar

from posttrain_dist.errors import Rule
from posttrain_dist.flow import By, Extra
from posttrain_dist.objectives.base import Objective

if TYPE_CHECKING:
    from posttrain_dist.flow import Batch

REF_LOGPROB = Extra("ref_logprob_N", by=By.model)
OLD_LOGPROB = Extra("old_logprob_N", by=By.model)


class Reference(Enum):
    """How the log-probabilities of the reference are had."""

    # adapter_off where switching the adapter off gives the model that training starts with; else
    # precomputed.
    auto = "auto"
    precomputed = "precomputed"  # of every sample of the run, once, before step 1
    adapter_off = "adapter_off"  # of the base model, in every step: the policy without its adapter
    frozen = "frozen"  # of a second copy, in every step


@dataclass(kw_only=True, slots=True)
class Referenced(Objective):
    """An objective that compares the policy with a reference.

    It declares `REF_LOGPROB` in its `extra`; the margin of an answer is the sum over its tokens of
    logprob_N - ref_logprob_N, subtracted token by token, so that equal models give exactly 0.
    """

    reference: Reference = Reference.auto
    # A model folder: of another model than the one that training starts with; null: that one.
    reference_model: str | None = None

    extra: ClassVar[tuple[Extra, ...]] = (REF_LOGPROB,)
    no_dropout: ClassVar[bool] = True

    def start_loss(self, batch: Batch) -> float | None:
        """The loss of a batch alone while policy and reference are equal; None: not known.

        Before the first update the loss is compared with it.
        """
        return None

    def rules(self) -> list[Rule]:
        """What must hold among the values of the group."""
        named, choice = self.reference_model, self.reference
        return [
            Rule(
                named is None or choice is not Reference.adapter_off,
                "objective.reference_model",
                f"is {named}, and with objective.reference=adapter_off the base model is the "
                "reference",
                "leave one of the two out",
            ),
            Rule(
                named is None or bool(named.strip()),
                "objective.reference_model",
                "is empty",
                "name a model folder, or leave it out: the reference is then what training starts "
                "with",
            ),
        ]
