"""NEFTune: noise on the embeddings of real tokens, by the length of each sample, in training."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from posttrain_kernels import linear_cross_entropy, linear_logprob
from torch import nn

from posttrain_dist.build import build_policy
from posttrain_dist.config import ModelConfig, RunConfig, TrainConfig, complete
from posttrain_dist.data.packs.collate import collate
from posttrain_dist.engine import AdamW
from posttrain_dist.engine.single import SingleEngine
from posttrain_dist.flow import Example
from posttrain_dist.models.head import HeadKernels
from posttrain_dist.models.layers import decoder_layers
from posttrain_dist.models.load import load_model
from posttrain_dist.models.policy import Policy
from posttrain_dist.objectives.base import TokenCount, TokenLoss
from posttrain_dist.tuning.base import Tuning
from posttrain_dist.tuning.full import Full
from posttrain_dist.tuning.prompt_tuning import Prompt
from posttrain_dist.tuning.virtual import insert_virtual_tokens

ALPHA, D = 5.0, 32
LENGTHS = (200, 50, 12)


@dataclass(kw_only=True, slots=True)
class Virtual(Tuning):
    """Two vectors of zeros before each sample."""

    def extend(self, batch):
        return insert_virtual_tokens(batch, 2)

    def embed(self, model, batch):
        words_TD = model.get_input_embeddings()(batch.input_ids_T.clamp(min=0))
        return torch.where((batch.input_ids_T < 0)[:, None], 0.0, words_TD)


def examples(lengths=LENGTHS) -> list[Example]:
    draw = np.random.default_rng(0)
    return [
        Example(
            draw.integers(5, 200, length).astype(np.int32),
            (np.arange(length) > 0).astype(np.float32),
            0,
            sample_id,
        )
        for sample_id, length in enumerate(lengths)
    ]


def policy_of(folder, alpha, tuning=None) -> Policy:
    model = load_model(
        ModelConfig(path=str(folder)),
        folder,
        dtype=torch.float32,
        seed=0,
        materialise=SingleEngine(AdamW(), torch.device("cpu")).materialise(),
        attach=(tuning or Full()).attach,
    )
    kernels = HeadKernels(linear_cross_entropy, linear_logprob)
    return Policy(model, kernels, 1, tuning, neftune_alpha=alpha)


def layer_input(policy, batch, seed=0) -> torch.Tensor:
    """[T, D], what the first layer reads."""
    seen = []
    layer = decoder_layers(policy.causal_lm)[0]
    with layer.register_forward_pre_hook(lambda _, args: seen.append(args[0][0].detach())):
        torch.manual_seed(seed)
        policy(batch, TokenLoss(), TokenCount(3.0))
    return seen[0]


def noise(policy, batch, seed=0) -> torch.Tensor:
    policy.eval()
    plain_TD = layer_input(policy, batch)
    policy.train()
    return layer_input(policy, batch, seed) - plain_TD


def assert_uniform(noise_LD, length):
    """Of the paper's formula, written out again."""
    bound = ALPHA / (length * D) ** 0.5
    assert noise_LD.abs().max() <= bound * 1.0001
    assert noise_LD.abs().max() > bound * 0.98
    deviation = bound / 3**0.5
    assert float(noise_LD.std()) == pytest.approx(deviation, rel=0.1)
    assert abs(float(noise_LD.mean())) < 4 * deviation / noise_LD.numel() ** 0.5


def test_each_sample_has_the_noise_of_its_own_length(tiny_llama):
    policy = policy_of(tiny_llama, ALPHA)
    batch = collate(examples())
    noise_TD = noise(policy, batch)
    for start, end in pairwise(batch.cu_seqlens_S):
        assert_uniform(noise_TD[start:end], end - start)
    # A sample alone has as much, another seed other noise.
    assert_uniform(noise(policy, collate(examples()[1:2])), 50)
    assert torch.equal(noise(policy, batch), noise_TD)
    assert (noise(policy, batch, seed=1) - noise_TD).abs().max() > 0.1


def test_tokens_that_follow_others_have_the_length_of_both(tiny_llama):
    rows = examples((150, 100, 60))
    batch = collate([rows[0], replace(rows[1], parent=0), replace(rows[2], parent=1)])
    noise_TD = noise(policy_of(tiny_llama, ALPHA), batch)
    for (start, end), length in zip(pairwise(batch.cu_seqlens_S), (150, 250, 310), strict=True):
        assert_uniform(noise_TD[start:end], length)


@pytest.mark.parametrize(
    "tuning", [Virtual(), Prompt(tokens=2), Prompt(tokens=2, ensemble=2)], ids=["zeros", "1", "2"]
)
def test_virtual_tokens_have_none_and_do_not_count(tiny_llama, tuning):
    noise_TD = noise(policy_of(tiny_llama, ALPHA, tuning), collate(examples()))
    start = 0
    for length in LENGTHS * tuning.copies:  # an ensemble has the row once for each prompt
        assert not noise_TD[start : start + 2].any()
        assert_uniform(noise_TD[start + 2 : start + 2 + length], length)
        start += 2 + length
    assert start == len(noise_TD)


def test_losses_and_gradients_are_those_of_the_noisy_embeddings(tiny_llama):
    import transformers

    policy, batch = policy_of(tiny_llama, ALPHA), collate(examples())
    noise_TD = noise(policy, batch)
    torch.manual_seed(0)
    loss = policy(batch, TokenLoss(), TokenCount(3.0))
    loss.total.backward()
    own = transformers.AutoModelForCausalLM.from_pretrained(tiny_llama, attn_implementation="eager")
    expected, total = [], torch.zeros(())
    for start, end in pairwise(batch.cu_seqlens_S):
        ids = batch.input_ids_T[start:end]
        embeds = own.get_input_embeddings()(ids) + noise_TD[start:end]
        nll = nn.functional.cross_entropy(
            own(inputs_embeds=embeds[None]).logits[0, :-1], ids[1:], reduction="none"
        )
        expected.append(nll.detach())
        total = total + nll.sum() / 3.0
    total.backward()
    nll_N = loss.nll_N[: batch.num_targets]
    torch.testing.assert_close(nll_N, torch.cat(expected), rtol=1e-5, atol=1e-5)
    gradient = policy.causal_lm.get_input_embeddings().weight.grad
    torch.testing.assert_close(
        gradient, own.get_input_embeddings().weight.grad, rtol=1e-4, atol=1e-5
    )


def test_evaluation_is_without_and_zero_is_as_if_it_were_not_there(tiny_llama):
    batch = collate(examples())
    plain, zero, noisy = (policy_of(tiny_llama, alpha) for alpha in (0.0, 0.0, ALPHA))
    losses = {}
    for name, policy, training in (
        ("plain", plain, True),
        ("zero", zero, True),
        ("evaluated", noisy, False),
        ("noisy", noisy, True),
    ):
        policy.train(training)
        torch.manual_seed(0)
        losses[name] = policy(batch, TokenLoss(), TokenCount(3.0)).nll_N.detach()
        drawn = torch.rand(1)
        torch.manual_seed(0)
        assert torch.equal(drawn, torch.rand(1)) == (name != "noisy")  # nothing else is drawn
    assert torch.equal(losses["plain"], losses["zero"])
    assert torch.equal(losses["plain"], losses["evaluated"])
    assert (losses["plain"] - losses["noisy"]).abs().max() > 1e-2
    noisy.eval()
    assert noisy.check_head(batch) < 1e-4


def test_the_config_asks_for_it(tiny_llama):
    config = complete(
        RunConfig(model=ModelConfig(path=str(tiny_llama)), train=TrainConfig(neftune_alpha=ALPHA))
    )
    engine = SingleEngine(AdamW(), torch.device("cpu"))
    policy = build_policy(config, engine, torch.float32, ["all"])
    assert_uniform(noise(policy, collate(examples((100,)))), 100)
