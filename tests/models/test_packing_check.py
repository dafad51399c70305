"""What no table vouches for is noticed before the first step: other attention, other positions."""

from __future__ import annotations

import pytest
import torch
from forests import examples
from posttrain_kernels import linear_cross_entropy, linear_logprob
from small_configs import small_config
from transformers import AutoModelForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from posttrain_dist.data.packs.collate import collate
from posttrain_dist.errors import ModelError
from posttrain_dist.flow import Batch, Example
from posttrain_dist.models.architectures.packing_check import check_packing
from posttrain_dist.models.attention import SDPA, register
from posttrain_dist.models.head import HeadKernels
from posttrain_dist.models.policy import Policy


def policy_of(model_type: str) -> Policy:
    register()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        small_config(model_type), dtype=torch.float32, attn_implementation=SDPA
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.2 if parameter.ndim > 1 else 0.5))
    kernels = HeadKernels(linear_cross_entropy, linear_logprob)
    return Policy(model.eval(), kernels, num_channels=1)


@pytest.fixture
def batch() -> Batch:
    draw = torch.Generator().manual_seed(0)
    rows = [torch.randint(5, 200, (n,), generator=draw).int().numpy() for n in (14, 9)]
    weights = [torch.ones(len(row)).numpy() for row in rows]
    return collate(
        [Example(r, w, channel=0, sample_id=0) for r, w in zip(rows, weights, strict=True)]
    )


@pytest.fixture
def nothing_known(monkeypatch):
    monkeypatch.setattr("posttrain_dist.models.policy.TRAINED", frozenset())


def test_an_unknown_architecture_that_is_exact_passes_and_stays_as_it_was(batch, nothing_known):
    policy = policy_of("llama")
    before = policy.causal_lm(**policy._inputs(batch)).logits
    assert policy.check_head(batch) < 1e-4
    assert policy.config._attn_implementation == SDPA
    assert torch.equal(policy.causal_lm(**policy._inputs(batch)).logits, before)


def test_samples_that_follow_others_are_compared_behind_them(nothing_known):
    policy, rows = policy_of("llama"), collate(examples("tree"))
    assert policy.check_head(rows) < 1e-4
    # Attention that leaves the parents out is another one.
    inputs = policy._inputs(rows)
    logits_TV = policy.causal_lm(**{**inputs, "parent_S": None}).logits[0].detach()
    with pytest.raises(ModelError, match="LlamaForCausalLM computes other logits for a sample"):
        check_packing(policy.causal_lm, inputs, logits_TV)


def test_an_unknown_architecture_that_ignores_positions_is_refused(batch, monkeypatch):
    policy = policy_of("llama")
    rotary = policy.causal_lm.model.rotary_emb
    own = rotary.forward

    def counted(hidden, position_ids):
        return own(hidden, torch.arange(position_ids.shape[1])[None])

    # Of one sample nothing shows, nor does RoPE tell where a sample begins: learned positions do.
    monkeypatch.setattr(rotary, "forward", counted)
    assert policy.check_head(batch) < 1e-4
    learned = policy_of("gpt2")
    table = learned.causal_lm.transformer.wpe
    forward = table.forward
    monkeypatch.setattr(table, "forward", lambda ids: forward(torch.arange(ids.shape[1])[None]))
    assert learned.check_head(batch) < 1e-4  # the head alone cannot see it
    monkeypatch.setattr("posttrain_dist.models.policy.TRAINED", frozenset())
    with pytest.raises(ModelError, match="GPT2LMHeadModel computes other logits for a sample"):
        learned.check_head(batch)


def test_a_state_that_runs_on_over_the_row_is_refused(batch):
    with pytest.raises(ModelError, match="Lfm3ForCausalLM computes other logits for a sample"):
        policy_of("lfm3").check_head(batch)


class Causal(torch.nn.Module):
    is_causal = True


class Bidirectional(torch.nn.Module):
    is_causal = False


@pytest.mark.parametrize(
    ("module", "options", "part"),
    [
        (Causal, {"cu_seqlens": None}, "Causal is not told where samples begin"),
        (Causal, {"attention_mask": torch.zeros(1, 1, 4, 4)}, "an attention mask of its own"),
        (Causal, {"is_causal": False}, "Causal attends in both directions"),
        (Bidirectional, {}, "Bidirectional attends in both directions"),
        (Causal, {"s_aux": torch.zeros(2)}, "gives its attention s_aux, which is not known here"),
        (Causal, {"position_bias": torch.zeros(2)}, "gives its attention position_bias"),
    ],
)
def test_a_layer_that_asks_for_another_attention_is_refused(module, options, part):
    register()
    qkv = (torch.randn(1, 2, 4, 8) for _ in range(3))
    given = {"attention_mask": None, "cu_seqlens": [0, 4], "s_aux": None, **options}
    with pytest.raises(ModelError, match=part):
        ALL_ATTENTION_FUNCTIONS[SDPA](module(), *qkv, **given)
