"""With its adapter off the policy is the base model, to the last bit, and nothing else changes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tuned_models import examples, scatter, tuned_policy

from posttrain_dist.data.packs.collate import collate
from posttrain_dist.flow import Batch
from posttrain_dist.models import Checkpointing
from posttrain_dist.models.policy import Policy
from posttrain_dist.reference.log_probs import log_probs
from posttrain_dist.tuning.base import Quantize
from posttrain_dist.tuning.bottleneck import Bottleneck, Placement
from posttrain_dist.tuning.full import Full
from posttrain_dist.tuning.ia3 import Ia3
from posttrain_dist.tuning.lora import Lora
from posttrain_dist.tuning.prefix_tuning import Prefix
from posttrain_dist.tuning.prompt_tuning import Prompt, PTuning

TUNINGS = {
    "lora": Lora(rank=4),
    "lora on the head": Lora(rank=4, targets=["q_proj", "lm_head"]),
    "dora": Lora(rank=4, dora=True),
    "ia3": Ia3(),
    "bottleneck": Bottleneck(reduction=4, placement=Placement.houlsby),
    "parallel": Bottleneck(reduction=4, placement=Placement.parallel),
    "prompt": Prompt(tokens=3),
    "p_tuning": PTuning(tokens=3),
    "prefix": Prefix(tokens=3),
}


def of(policy: Policy, batch: Batch) -> torch.Tensor:
    return log_probs(policy, batch)


@pytest.mark.parametrize("name", TUNINGS)
def test_off_is_a_separate_copy_of_the_base(name: str, tiny_llama: Path) -> None:
    batch, tuning = collate(examples()), TUNINGS[name]
    copy = of(tuned_policy(tiny_llama, Full()), batch)
    policy = tuned_policy(tiny_llama, tuning)
    if tuning.begins_as_base and not getattr(tuning, "dora", False) and "head" not in name:
        assert torch.equal(of(policy, batch), copy)
    scatter(policy.causal_lm, tuning)
    before = of(policy, batch)
    trained = [n for n, p in policy.causal_lm.named_parameters() if p.requires_grad]
    with policy.base():
        assert torch.equal(of(policy, batch), copy)
    assert torch.equal(of(policy, batch), before)
    assert float((before - copy).abs().max()) > 1e-3
    assert trained == [n for n, p in policy.causal_lm.named_parameters() if p.requires_grad]


def test_off_is_the_base_in_four_bits(nf4_llama: Path) -> None:
    tuning = Lora(rank=4, quantize=Quantize.nf4)
    batch = collate(examples())
    policy = tuned_policy(nf4_llama, tuning, nf4=True)
    start = of(policy, batch)
    scatter(policy.causal_lm, tuning)
    assert not torch.equal(of(policy, batch), start)
    with policy.base():
        assert torch.equal(of(policy, batch), start)


def test_off_lasts_no_longer_than_its_context_where_layers_are_computed_again(
    tiny_llama: Path,
) -> None:
    tuning = Lora(rank=4)
    policy = tuned_policy(tiny_llama, tuning, activation_checkpointing=Checkpointing.full)
    scatter(policy.causal_lm, tuning)
    policy.train()
    batch = collate(examples())
    from posttrain_dist.objectives.base import TokenCount, TokenLoss

    def gradients() -> dict[str, torch.Tensor]:
        policy.zero_grad()
        policy(batch, TokenLoss(), TokenCount(3.0)).total.backward()
        return {n: p.grad.clone() for n, p in policy.named_parameters() if p.grad is not None}

    alone = gradients()
    with policy.base():
        of(policy, batch)
    again = gradients()
    assert alone.keys() == again.keys()
    assert all(torch.equal(alone[name], again[name]) for name in alone)
