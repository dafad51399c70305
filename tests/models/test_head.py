"""Log-probabilities of the head are those of the model's own logits."""

from __future__ import annotations

from contextlib import nullcontext

import numpy as np
import pytest
import torch
from posttrain_kernels import linear_cross_entropy, linear_logprob

from posttrain_dist.data.packs.collate import collate
from posttrain_dist.errors import ModelError
from posttrain_dist.flow import Example
from posttrain_dist.models import Attention, ModelConfig
from posttrain_dist.models.head import HeadKernels
from posttrain_dist.models.load import load_model
from posttrain_dist.models.policy import Policy

# Caps and scales so far from 1 that forgetting one changes the first digits.
CASES = {
    "Llama": {"tie_word_embeddings": True},
    "Gemma2": {"final_logit_softcapping": 3.0, "query_pre_attn_scalar": 8},
    "Granite": {"logits_scaling": 0.4},
}


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("name", CASES)
def test_logprob_is_the_log_softmax_of_the_logits(name, temperature, tmp_path, builders):
    import transformers

    folder = builders.model(tmp_path / "model", architecture=name, **CASES[name])
    ids_L = np.random.default_rng(0).integers(5, 200, 40).astype(np.int32)
    batch = collate([Example(ids_L, np.ones(40, np.float32), 0, 0)])
    config = ModelConfig(path=str(folder), attention=Attention.eager)
    model = load_model(config, folder, dtype=torch.float32, seed=0, materialise=nullcontext())
    policy = Policy(model, HeadKernels(linear_cross_entropy, linear_logprob), num_channels=1)
    factor_N = torch.linspace(-1, 2, 39)
    if temperature != 1.0 and name == "Gemma2":
        with pytest.raises(ModelError, match="caps its logits"):
            policy.head.logprob(torch.zeros(1, 32), torch.zeros(1).long(), temperature=temperature)
        return
    found = policy.head.logprob(
        policy.hidden(batch), batch.labels_N, temperature=temperature, entropy=True
    )
    (found.logprob_N[:39] * factor_N).sum().backward()

    own = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    logits = own(input_ids=batch.input_ids_T[None]).logits[0, :-1] / temperature
    every = logits.log_softmax(-1)
    logprob = every.gather(1, batch.input_ids_T[1:, None])[:, 0]
    (logprob * factor_N).sum().backward()
    torch.testing.assert_close(found.logprob_N[:39], logprob, rtol=1e-5, atol=1e-5)
    entropy = -(every.exp() * every).sum(-1)
    torch.testing.assert_close(found.entropy_N[:39], entropy, rtol=1e-5, atol=1e-5)
    gradients = dict(own.named_parameters())
    for name, parameter in model.named_parameters():
        distance = (parameter.grad - gradients[name].grad).norm()
        assert distance <= 2e-5 * gradients[name].grad.norm(), name


def test_the_module_alone_is_the_plain_projection(tiny_llama):
    config = ModelConfig(path=str(tiny_llama))
    model = load_model(config, tiny_llama, dtype=torch.float32, seed=0, materialise=nullcontext())
    plain = model.get_output_embeddings()
    hidden = torch.randn(1, 3, plain.weight.shape[1])
    before = plain(hidden)
    policy = Policy(model, HeadKernels(linear_cross_entropy, linear_logprob), num_channels=1)
    assert policy.head.module is plain
    assert torch.equal(policy.head.module(hidden), before)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("name", ["Gemma2", "Granite"])
def test_lora_on_the_head_is_that_of_plain_peft(name, dora, tmp_path, builders):
    """Log-probabilities, and the gradients of A, B and the magnitudes, with cap and scale."""
    import peft
    import transformers
    import tuned_models as tuned

    from posttrain_dist.tuning.lora import Lora

    changes = {**CASES[name], "tie_word_embeddings": False}
    folder = builders.model(tmp_path / "model", architecture=name, **changes)
    tuning = Lora(rank=4, alpha=6.0, targets=["lm_head"], dora=dora)
    policy = tuned.tuned_policy(folder, tuning)
    tuned.scatter(policy.causal_lm, tuning)
    batch = collate(tuned.examples((40,)))
    found = policy.head.logprob(policy.hidden(batch), batch.labels_N, entropy=True)
    factor_N = torch.linspace(-1, 2, batch.num_targets)
    (found.logprob_N[: batch.num_targets] * factor_N).sum().backward()

    saved = tuning.to_adapter(tuned.kept_of(policy, tuning), policy.config.to_dict())
    adapter = tuned.write_folder(tmp_path / "adapter", saved, folder)
    own = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    own = peft.PeftModel.from_pretrained(own, str(adapter), is_trainable=True).eval()
    every = own(input_ids=batch.input_ids_T[None]).logits[0].log_softmax(-1)[batch.supervised_N]
    logprob = every.gather(1, batch.labels_N[:, None])[: batch.num_targets, 0]
    (logprob * factor_N).sum().backward()
    torch.testing.assert_close(found.logprob_N[: batch.num_targets], logprob, rtol=1e-5, atol=1e-5)
    theirs = {
        n.removeprefix("base_model.model."): p.grad
        for n, p in own.named_parameters()
        if p.requires_grad
    }
    ours = {n: p.grad for n, p in policy.causal_lm.named_parameters() if p.requires_grad}
    assert ours.keys() == theirs.keys() and len(ours) == 2 + dora
    for key, gradient in ours.items():
        assert (gradient - theirs[key]).norm() <= 2e-5 * theirs[key].norm(), key
    assert max(policy.check_parity(batch).values()) < 1e-4
    assert policy.check_head(batch) < 1e-4
