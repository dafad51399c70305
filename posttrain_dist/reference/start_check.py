"""Before the first update the policy is its reference: every margin is 0.

A margin that is not means that the two read other tokens, other weights or another dtype, and a
training would go towards or away from a model that nobody meant.
"""

from __future__ import annotations

import torch

from posttrain_dist import dist
from posttrain_dist.engine.base import TrainEngine
from posttrain_dist.errors import TrainingError
from posttrain_dist.flow import Batch
from posttrain_dist.objectives.reference_choice import REF_LOGPROB, Referenced
from posttrain_dist.reference.log_probs import log_probs

# Of the mean difference of a token's log-probability, over its size where that is above 1: another
# packing rounds otherwise. Measured on CPUs in float32: 0 to 1.6e-5 of a token; for bfloat16 what
# `Policy.check_head` allows.
_ROUNDING = {torch.float32: 2e-5, torch.bfloat16: 3e-2}
_LOSS_ROUNDING = 1e-5


def check_start(
    engine: TrainEngine, objective: Referenced, batch: Batch, dtype: torch.dtype, *, exact: bool
) -> float:
    """Compare policy and reference on this rank's first batch; collective.

    Args:
        batch: of the first step, with the reference's log-probabilities.
        dtype: of the weights.
        exact: the same model runs on the same row in both, so that nothing may differ.

    Returns:
        The largest difference of a token's log-probability on this rank.

    Raises:
        TrainingError: they differ by more than rounding, or the loss is not what it is at a
            margin of 0.
    """
    engine.train(False)
    reference_N = batch.extra[REF_LOGPROB.name]
    real_N = batch.weight_N != 0
    difference_N = torch.where(real_N, log_probs(engine.forward, batch) - reference_N, 0.0)
    count = objective.count(batch)
    counted = all(value > 0 for value in count)
    with torch.no_grad():
        ones = count._make([value if value > 0 else 1.0 for value in count])
        loss = float(engine.forward(batch, objective, ones).total)
    largest = float(difference_N.abs().max())
    tokens = max(1, batch.num_targets)
    mean = float(difference_N.abs().sum()) / tokens
    size = max(1.0, float(torch.where(real_N, reference_N.abs(), 0.0).sum()) / tokens)
    allowed = 0.0 if exact else _ROUNDING[dtype] * size
    margin = _largest_sum(difference_N, batch)
    expected = objective.start_loss(batch) if counted else None

    def judge() -> None:
        if not mean <= allowed:
            raise TrainingError(
                f"the policy and its reference differ before the first update: by {mean:.2e} in "
                f"the log-probability of a token on average, {largest:.2e} at most (allowed: "
                f"{allowed:.0e}), so that an answer's margin is {margin:.2e} and not 0",
                where="step 0, objective.reference",
                fix="name the model that training starts with, or leave objective.reference_model "
                "out; if neither explains it, start again with train.dtype=float32 and report it",
            )
        if expected is not None and not abs(loss - expected) <= _LOSS_ROUNDING + margin:
            raise TrainingError(
                f"the loss before the first update is {loss:.6f}, and at a margin of 0 it is "
                f"{expected:.6f}",
                where="step 0, objective",
                fix="this is a fault of the objective: report it",
            )

    dist.on_all(judge)
    return largest


def _largest_sum(difference_N: torch.Tensor, batch: Batch) -> float:
    sums_S = difference_N.new_zeros(len(batch.sample_id_S))
    return float(sums_S.index_add_(0, batch.sample_N, difference_N).abs().max())
