"""A sample inside a pack has the loss that it has by itself, on every supported architecture."""

from __future__ import annotations

from contextlib import nullcontext

import numpy as np
import pytest
import torch
from posttrain_kernels import linear_cross_entropy

from posttrain_dist.data.collate import collate
from posttrain_dist.errors import ModelError
from posttrain_dist.flow import Example
from posttrain_dist.models import Attention, ModelConfig
from posttrain_dist.models.attention import EAGER, SDPA, implementation
from posttrain_dist.models.load import load_model
from posttrain_dist.models.policy import Policy
from posttrain_dist.objectives.sft import Sft

# Caps so low that forgetting one changes the loss in its first digits.
CAPS = {"final_logit_softcapping": 3.0, "attn_logit_softcapping": 2.0}
ARCHITECTURES = {
    "Llama": {},
    "Qwen3": {},
    "Mistral": {"sliding_window": 6},
    "Gemma2": {"sliding_window": 6, "query_pre_attn_scalar": 8, **CAPS},
}


@pytest.fixture(scope="module", params=ARCHITECTURES)
def folder(request, tmp_path_factory, builders):
    name = request.param
    target = tmp_path_factory.mktemp(name)
    return builders.model(target, architecture=name, **ARCHITECTURES[name])


def examples(vocabulary: int) -> list[Example]:
    draw = np.random.default_rng(0)
    lengths = [5, 17, 2, 11]
    return [
        Example(
            input_ids_L=draw.integers(5, vocabulary, n).astype(np.int32),
            weight_L=((draw.random(n) < 0.6) | (np.arange(n) == 1)).astype(np.float32)
            * (np.arange(n) > 0),
            channel=i % 2,
            sample_id=i,
        )
        for i, n in enumerate(lengths)
    ]


def policy_of(folder, attention=Attention.auto) -> Policy:
    config = ModelConfig(path=str(folder), attention=attention)
    model = load_model(config, folder, dtype=torch.float32, seed=0, materialise=nullcontext())
    return Policy(model, linear_cross_entropy, num_channels=2)


def test_a_sample_in_a_pack_has_the_loss_it_has_alone(folder):
    import transformers

    policy = policy_of(folder)
    rows = examples(policy.config.vocab_size)
    batch = collate(rows)
    packed = policy(batch, Sft(), 1.0).nll_N[: batch.num_targets]
    # The independent reference: transformers' own eager attention on one unpacked row.
    own = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    expected = []
    for row in rows:
        ids = torch.from_numpy(row.input_ids_L.astype(np.int64))
        logits = own(input_ids=ids[None]).logits[0, :-1]
        nll = torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none")
        expected.append(nll[torch.from_numpy(row.weight_L[1:]) > 0])
    torch.testing.assert_close(packed, torch.cat(expected), rtol=1e-5, atol=1e-5)


def test_changing_one_sample_leaves_the_others_alone(folder):
    policy = policy_of(folder)
    rows = examples(policy.config.vocab_size)
    before = policy(collate(rows), Sft(), 1.0).nll_N
    changed = Example(rows[0].input_ids_L + 1, rows[0].weight_L, channel=0, sample_id=0)
    after = policy(collate([changed, *rows[1:]]), Sft(), 1.0).nll_N
    first = int(rows[0].weight_L.sum())
    assert torch.equal(before[first:], after[first:])
    assert not torch.equal(before[:first], after[:first])


def test_activation_checkpointing_changes_no_gradient(folder):
    gradients = []
    for activation_checkpointing in (False, True):
        config = ModelConfig(path=str(folder), activation_checkpointing=activation_checkpointing)
        model = load_model(config, folder, dtype=torch.float32, seed=0, materialise=nullcontext())
        policy = Policy(model, linear_cross_entropy, num_channels=2).train()
        policy(collate(examples(policy.config.vocab_size)), Sft(), 10.0).total.backward()
        gradients.append({n: p.grad for n, p in policy.named_parameters()})
    for name, gradient in gradients[0].items():
        assert gradient.abs().sum() > 0, name
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-5, atol=1e-7, msg=name)


def test_head_check_passes_and_notices_a_forgotten_cap(folder):
    policy = policy_of(folder)
    batch = collate(examples(policy.config.vocab_size))
    assert policy.check_head(batch, Sft()) < 1e-4
    blind = policy_of(folder)
    if blind.config.model_type == "gemma2":
        from posttrain_dist.models import policy as module
        from posttrain_dist.models.shape import HeadShape

        blind.head.forward = module._fused_forward(
            blind.head, HeadShape(), linear_cross_entropy, num_channels=2
        )
        with pytest.raises(ModelError, match="differs from the logits of Gemma2ForCausalLM"):
            blind.check_head(batch, Sft())


def test_sdpa_is_refused_where_attention_is_capped():
    with pytest.raises(ModelError, match=r"caps its attention logits at 50.0"):
        implementation(Attention.sdpa, 50.0)
    assert implementation(Attention.auto, 50.0) == EAGER
    assert implementation(Attention.auto, None) == SDPA
