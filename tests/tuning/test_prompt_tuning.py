"""Prompts begin with words of the model; an ensemble is several prompts, each as if alone."""

from __future__ import annotations

import pytest
import torch
from virtual_cases import examples, kept, peft_logits, policy_of, step, write_peft

from posttrain_dist.data.packs.collate import collate
from posttrain_dist.errors import ConfigError, ModelError
from posttrain_dist.models.folder import load_tokenizer
from posttrain_dist.objectives.base import TokenCount, TokenLoss
from posttrain_dist.tuning.prompt_tuning import (
    Prompt,
    PTuning,
    join_ensemble,
    split_ensemble,
)


def test_a_prompt_begins_with_the_embeddings_of_its_text(tiny_llama):
    policy = policy_of(tiny_llama, Prompt(tokens=7, init_text="the fox"), spread=0)
    ids = load_tokenizer(tiny_llama).backend_tokenizer.encode("the fox").ids
    assert 1 < len(ids) < 7
    words = policy.causal_lm.get_input_embeddings().weight
    assert torch.equal(policy.causal_lm.prompt.weight, words[(ids * 7)[:7]])


def test_a_prompt_without_text_begins_with_words_of_the_model(tiny_llama):
    first, again = (policy_of(tiny_llama, Prompt(tokens=7), spread=0) for _ in range(2))
    prompt = first.causal_lm.prompt.weight
    words = first.causal_lm.get_input_embeddings().weight
    assert all(bool((words == row).all(dim=1).any()) for row in prompt)
    assert len({tuple(row.tolist()) for row in prompt}) > 4  # and not one word seven times
    assert torch.equal(prompt, again.causal_lm.prompt.weight)


def test_an_empty_text_and_a_text_without_tokens_are_refused(tiny_llama):
    broken = [rule.key for rule in Prompt(init_text=" ").rules() if not rule.holds]
    assert broken == ["tuning.init_text"]
    with pytest.raises(ConfigError, match="'' has no token"):
        policy_of(tiny_llama, Prompt(init_text=""))


def test_each_prompt_of_an_ensemble_is_trained_as_if_alone(tiny_llama):
    several = policy_of(tiny_llama, Prompt(tokens=3, ensemble=4))
    loss, gradients = step(several, examples())
    batch = collate(examples())
    with torch.no_grad():
        each = several.losses(batch, TokenLoss(), TokenCount(3.0))
    table = several.causal_lm.prompt.weight.detach()
    single = policy_of(tiny_llama, Prompt(tokens=3))
    found = []
    for e in range(4):
        with torch.no_grad():
            single.causal_lm.prompt.weight.copy_(table[3 * e : 3 * e + 3])
        own, gradient = step(single, examples())
        found.append(own)
        expected = gradient["prompt.weight"] / 4
        difference = gradients["prompt.weight"][3 * e : 3 * e + 3] - expected
        assert float(difference.norm()) <= 1e-6 * float(expected.norm())
        torch.testing.assert_close(each[e].nll_N, own.nll_N, rtol=1e-6, atol=1e-6)
    totals = [float(own.total.detach()) for own in found]
    assert max(totals) - min(totals) > 0.01
    assert float(loss.total) == pytest.approx(sum(totals) / 4, rel=1e-6)
    mean = sum(own.channels_CK for own in found) / 4
    torch.testing.assert_close(loss.channels_CK, mean, rtol=1e-6, atol=0)
    assert len(loss.nll_N) == len(loss.correct_N) == len(batch.labels_N)
    torch.testing.assert_close(loss.nll_N, sum(own.nll_N for own in found) / 4)
    right = sum(own.correct_N.int() for own in found)
    assert torch.equal(loss.correct_N, right > 2)
    assert several.check_head(batch) < 1e-4
    assert max(several.check_parity(batch).values()) < 1e-4


def test_only_the_first_prompt_of_an_ensemble_begins_with_the_text(tiny_llama):
    text = {"tokens": 3, "init_text": "the quick brown fox"}
    several = policy_of(tiny_llama, Prompt(ensemble=3, **text), spread=0).causal_lm.prompt.weight
    single = policy_of(tiny_llama, Prompt(**text), spread=0).causal_lm.prompt.weight
    first, second, third = several.split(3)
    assert torch.equal(first, single)
    assert not torch.equal(first, second) and not torch.equal(second, third)


def test_each_prompt_of_an_ensemble_loads_in_plain_peft(tiny_llama, tmp_path):
    tuning = Prompt(tokens=3, ensemble=2)
    policy = policy_of(tiny_llama, tuning)
    network = policy.config.to_dict()
    whole = tuning.to_adapter(kept(policy, tuning), network)
    parts = split_ensemble(whole)
    ids_L = examples()[1].input_ids_L
    for e, part in enumerate(parts):
        write_peft(tmp_path / f"{e}", part)
        single = Prompt(tokens=3)
        assert torch.equal(
            single.from_adapter(part, network)["prompt.weight"],
            policy.causal_lm.prompt.weight[3 * e : 3 * e + 3],
        )
        row = policy._extended(collate([examples()[1]]))
        with torch.no_grad():
            logits = policy.causal_lm(**policy._inputs(row)).logits[0]
        own = logits[row.cu_seqlens_S[e] + 3 : row.cu_seqlens_S[e + 1]]
        expected = peft_logits(tiny_llama, tmp_path / f"{e}", ids_L, 3)
        torch.testing.assert_close(own, expected, rtol=1e-5, atol=1e-5)
    back = tuning.from_adapter(join_ensemble(parts), network)
    assert torch.equal(back["prompt.weight"], policy.causal_lm.prompt.weight)
    with pytest.raises(ModelError, match=r"holds 1 prompts, and tuning\.ensemble is 2"):
        tuning.from_adapter(parts[0], network)


def test_a_prompt_goes_on_from_what_p_tuning_made(tiny_llama):
    """Bit for bit the same loss: it is the output of the MLP that is saved."""
    made = PTuning(tokens=3, hidden_size=20, layers=3)
    policy = policy_of(tiny_llama, made)
    network = policy.config.to_dict()
    saved = made.to_adapter(kept(policy, made), network)
    prompt = Prompt(tokens=3)
    other = policy_of(tiny_llama, prompt)
    with torch.no_grad():
        other.causal_lm.prompt.weight.copy_(prompt.from_adapter(saved, network)["prompt.weight"])
    batch = collate(examples())
    found, expected = (each(batch, TokenLoss(), TokenCount(3.0)).nll_N for each in (other, policy))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
