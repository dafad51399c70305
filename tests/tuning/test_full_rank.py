"""LoRA whose rank is the dimension learns what full tuning of the same linears learns."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import tuned_models as tuned

from posttrain_dist.config import Full
from posttrain_dist.data.packs.collate import collate
from posttrain_dist.flow import Batch, Example
from posttrain_dist.objectives.base import TokenCount, TokenLoss
from posttrain_dist.tuning.base import Tuning
from posttrain_dist.tuning.lora import Lora

pytestmark = pytest.mark.slow
NAMES = ["q_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]  # 32 x 32 and 32 x 48
STEPS, LR = 300, 1e-2


def counting(seed: int) -> Batch:
    """Rows that count up in steps of 1 to 3: what comes next follows from the two before."""
    draw = np.random.default_rng(seed)
    weight_L = (np.arange(24) > 2).astype(np.float32)
    rows = []
    for i in range(8):
        start, step = draw.integers(0, 20), draw.integers(1, 4)
        ids_L = ((np.arange(24) * step + start) % 97 + 100).astype(np.int32)
        rows.append(Example(ids_L, weight_L, 0, i))
    return collate(rows)


def heldout_loss(folder, tuning: Tuning, steps: int = STEPS) -> float:
    policy = tuned.tuned_policy(folder, tuning)
    engine, objective = tuned.engine_of(policy), TokenLoss()
    for step in range(steps):
        batch = counting(step)
        loss = engine.forward(batch, objective, TokenCount(objective.count(batch).tokens))
        engine.backward(loss.total, last=True)
        engine.step(LR * min(1.0, (step + 1) / 20) * (1 - step / STEPS))
    batches = [counting(10_000 + i) for i in range(20)]
    with torch.no_grad():
        sums = [float(engine.forward(b, objective, TokenCount(1.0)).total) for b in batches]
    return sum(sums) / sum(objective.count(b).tokens for b in batches)


def test_lora_of_full_rank_ends_within_1_percent_of_full_tuning(tiny_llama):
    full = heldout_loss(tiny_llama, Full(train=f".*({'|'.join(NAMES)})[.]weight"))
    lora = heldout_loss(tiny_llama, Lora(rank=32, alpha=32, targets=NAMES))
    before = heldout_loss(tiny_llama, Lora(rank=32, alpha=32, targets=NAMES), steps=0)
    one = heldout_loss(tiny_llama, Lora(rank=1, alpha=1, targets=["q_proj"]))
    assert lora == pytest.approx(full, rel=0.01)
    assert full < 0.6 * before
    assert one > 1.3 * full
