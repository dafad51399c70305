"""Names of the losses and divergences of DPO's family, and what each of them can do. No torch."""

from __future__ import annotations

from enum import Enum


class LossType(Enum):
    """A loss of two answers; pair_losses.py has the formulas."""

    sigmoid = "sigmoid"
    hinge = "hinge"
    ipo = "ipo"
    robust = "robust"
    sigmoid_norm = "sigmoid_norm"
    exo_pair = "exo_pair"
    sppo_hard = "sppo_hard"
    apo_zero = "apo_zero"
    apo_down = "apo_down"


class Divergence(Enum):
    """What keeps the policy near the reference."""

    reverse_kl = "reverse_kl"
    forward_kl = "forward_kl"
    js = "js"
    alpha = "alpha"


WITH_SMOOTHING = (LossType.sigmoid, LossType.robust, LossType.sigmoid_norm, LossType.exo_pair)
WITH_MARGIN = (LossType.sigmoid, LossType.hinge, LossType.robust, LossType.sigmoid_norm)
# Those of the difference of two scores; the others are made for the reverse KL.
WITH_DIVERGENCE = (LossType.sigmoid, LossType.hinge, LossType.robust)
