"""Rows whose samples follow others, and the same samples each alone behind what it follows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from posttrain_dist.data.packs.collate import collate
from posttrain_dist.flow import Batch, Example
from posttrain_dist.models.policy import Policy
from posttrain_dist.objectives.base import TokenCount, TokenLoss

# (tokens, number of the sample that it follows). Only answers are trained on, but for trees.
PAIRS = [(17, None), (5, 0), (9, 0), (11, None), (1, 3), (6, 3), (23, None), (4, 6), (7, 6)]
GROUP = [(19, None), *((3 + i, 0) for i in range(8))]
# As the turns of a conversation: each goes on from inside of another, and inner ones are targets.
TREE = [(14, None), (6, 0), (9, 0), (4, 2), (8, 2), (5, 4), (1, 4), (7, None)]
FORESTS = {"pairs": PAIRS, "group": GROUP, "tree": TREE}


def examples(kind: str, seed: int = 0) -> list[Example]:
    draw = np.random.default_rng(seed)
    made = []
    for sample_id, (length, parent) in enumerate(FORESTS[kind]):
        ids_L = draw.integers(5, 200, length).astype(np.int32)
        weight_L = draw.choice([0.0, 0.5, 1.0], length).astype(np.float32)
        if kind != "tree":
            weight_L[:] = parent is not None
        weight_L[0] = 0 if parent is None else 2.0  # which the parent's last token predicts
        made.append(Example(ids_L, weight_L, sample_id % 2, sample_id, parent=parent))
    return made


def chain(rows: Sequence[Example], sample_id: int) -> list[Example]:
    """A sample behind all that it follows."""
    row = rows[sample_id]
    return [*([] if row.parent is None else chain(rows, row.parent)), row]


def alone(rows: Sequence[Example]) -> list[Example]:
    """Each sample by itself, behind the tokens of what it follows, which are not trained on."""
    made = []
    for row in rows:
        *before, _ = whole = chain(rows, row.sample_id)
        ids_L = np.concatenate([each.input_ids_L for each in whole])
        masked = [np.zeros_like(each.weight_L) for each in before]
        weight_L = np.concatenate([*masked, row.weight_L])
        made.append(Example(ids_L, weight_L, row.channel, row.sample_id))
    return made


def step(policy: Policy, batches: Sequence[Batch]) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss, and gradient of each parameter that has one, of several rows together."""
    policy.zero_grad()
    total = 0.0
    for batch in batches:
        loss = policy(batch, TokenLoss(), TokenCount(7.0))
        loss.total.backward()
        total += float(loss.total.detach())
    named = policy.causal_lm.named_parameters()
    return total, {name: p.grad.clone() for name, p in named if p.grad is not None}


def check_equal(policy: Policy, rows: Sequence[Example], together: bool = False) -> None:
    """One row of trees has the loss and the gradient of its samples alone: fp32 rounding apart.

    Args:
        together: the samples alone stand in one row; else each in its own.
    """
    loss, gradients = step(policy, [collate(rows)])
    singles = alone(rows)
    batches = [collate(singles)] if together else [collate([row]) for row in singles]
    expected, wanted = step(policy, batches)
    assert abs(loss - expected) <= 2e-6 * max(1.0, abs(expected))
    assert gradients.keys() == wanted.keys() and len(wanted) > 0
    for name, gradient in gradients.items():
        error = float((gradient.double() - wanted[name].double()).norm())
        assert error <= 5e-6 * float(wanted[name].double().norm()), name
    whole, other = (
        torch.cat([own[name].double().flatten() for name in wanted]) for own in (gradients, wanted)
    )
    assert float((whole - other).norm()) <= 1e-6 * float(other.norm())
