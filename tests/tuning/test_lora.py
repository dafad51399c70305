"""LoRA and its family against plain `peft`, closed forms, and each sample alone."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
import tuned_models as tuned

from posttrain_dist.config import Full
from posttrain_dist.data.packs.collate import collate
from posttrain_dist.models import Checkpointing
from posttrain_dist.tuning.ia3 import Ia3
from posttrain_dist.tuning.lora import Lora, LoraInit

HEAD = ["q_proj", "down_proj", "lm_head"]
SMALL = {"rank": 4, "alpha": 6.0}
TUNINGS = {
    "lora": Lora(**SMALL),
    "rslora": Lora(**SMALL, rslora=True),
    "dora": Lora(**SMALL, dora=True),
    "pissa": Lora(**SMALL, init=LoraInit.pissa),
    "pissa_dora": Lora(**SMALL, init=LoraInit.pissa, dora=True, rslora=True),
    "lora_fa": Lora(**SMALL, freeze_a=True, targets="attention"),
    "in_full": Lora(**SMALL, targets="mlp", modules_to_save=["model.norm", "q_proj", "lm_head"]),
    "head": Lora(**SMALL, targets=HEAD),
    "dora_head": Lora(**SMALL, targets=HEAD, dora=True),
    "ia3": Ia3(),
}
each_tuning = pytest.mark.parametrize("name", TUNINGS)


@pytest.fixture(scope="module")
def policies(tiny_llama):
    """name -> (policy with everything moved, tuning), made once."""
    made = {}

    def get(name: str):
        if name not in made:
            policy = tuned.tuned_policy(tiny_llama, TUNINGS[name])
            tuned.scatter(policy.causal_lm, TUNINGS[name])
            made[name] = policy
        return made[name], TUNINGS[name]

    return get


@each_tuning
def test_at_step_0_the_model_is_the_base_bit_for_bit(tiny_llama, name):
    tuning = TUNINGS[name]
    batch = collate(tuned.examples())
    with torch.no_grad():
        base = tuned.tuned_policy(tiny_llama, Full()).hidden(batch)
        policy = tuned.tuned_policy(tiny_llama, tuning)
        hidden = policy.hidden(batch)
    if name.startswith("pissa"):  # W - B0 A0 + B A rounds
        torch.testing.assert_close(hidden, base, rtol=1e-6, atol=2e-6)
        assert not torch.equal(hidden, base)
    else:
        assert torch.equal(hidden, base)
    assert policy.check_head(batch) < 1e-5
    trained = {n for n, p in policy.causal_lm.named_parameters() if p.requires_grad}
    assert trained and trained == {
        n for n, _ in policy.causal_lm.named_parameters() if tuning.trained(n)
    }


@each_tuning
def test_saved_it_is_the_same_in_plain_peft(policies, tiny_llama, tmp_path, name):
    policy, tuning = policies(name)
    network = policy.config.to_dict()
    saved = tuning.to_adapter(tuned.kept_of(policy, tuning), network)
    folder = tuned.write_folder(tmp_path / "adapter", saved, tiny_llama)
    row = tuned.examples()[1]
    ids = torch.from_numpy(row.input_ids_L).long()
    expected = tuned.peft_logits(tiny_llama, folder, ids)
    torch.testing.assert_close(tuned.policy_logits(policy, row), expected, rtol=1e-5, atol=2e-5)
    moved = (expected - tuned.peft_logits(tiny_llama, None, ids)).abs().max()
    assert moved > 0.05
    again = tuning.from_adapter(saved, network)
    kept = tuned.kept_of(policy, tuning)
    assert again.keys() == kept.keys()
    for key, tensor in kept.items():
        assert torch.equal(again[key], tensor), key


@each_tuning
def test_merged_it_is_the_same_without_an_adapter(policies, tiny_llama, name):
    import transformers
    from safetensors.torch import load_file

    policy, tuning = policies(name)
    part = re.compile(r"[.](lora_|ia3_l|pissa_|weight$).*")  # what stands behind a module's name
    kept = tuned.kept_of(policy, tuning)
    base = load_file(tiny_llama / "model.safetensors")
    merged = {n: tuning.merge(n, w, kept, policy.config.to_dict()) for n, w in base.items()}
    changed = {n for n in base if not torch.equal(base[n], merged[n])}
    assert changed == {f"{part.sub('', name)}.weight" for name in kept}
    own = transformers.AutoModelForCausalLM.from_pretrained(tiny_llama, attn_implementation="eager")
    own.load_state_dict(merged)
    row = tuned.examples()[1]
    with torch.no_grad():
        logits = own(input_ids=torch.from_numpy(row.input_ids_L).long()[None]).logits[0]
    torch.testing.assert_close(tuned.policy_logits(policy, row), logits, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("name", ["lora", "dora_head", "pissa", "ia3"])
def test_a_packed_row_has_the_losses_and_gradients_of_its_samples_alone(policies, name):
    policy, _ = policies(name)
    rows = tuned.examples()
    losses, gradients = tuned.run(policy, collate(rows))
    alone, sums = [], {}
    for row in rows:
        found, own = tuned.run(policy, collate([row]))
        alone.append(found)
        sums = {n: g + sums.get(n, 0) for n, g in own.items()}
    torch.testing.assert_close(losses, torch.cat(alone), rtol=1e-6, atol=2e-6)
    swapped, permuted = tuned.run(policy, collate(rows[::-1]))
    torch.testing.assert_close(swapped.sort()[0], losses.sort()[0], rtol=1e-6, atol=2e-6)
    for key, gradient in gradients.items():
        assert gradient.norm() > 0
        for other in (sums[key], permuted[key]):
            assert (gradient - other).norm() <= 2e-6 * gradient.norm(), key


@pytest.mark.parametrize("name", ["lora", "rslora", "head"])
def test_gradients_of_a_and_b_are_those_of_the_whole_weight_projected(policies, tiny_llama, name):
    """g_B = s g_W A^T and g_A = s B^T g_W, with g_W that of full tuning on the merged model."""
    policy, tuning = policies(name)
    batch = collate(tuned.examples())
    _, gradients = tuned.run(policy, batch)
    kept = tuned.kept_of(policy, tuning)
    whole = tuned.tuned_policy(tiny_llama, Full())
    with torch.no_grad():
        for key, weight in whole.causal_lm.named_parameters():
            weight.copy_(tuning.merge(key, weight, kept))
    _, full = tuned.run(whole, batch)
    factors = [key for key in gradients if ".lora_A." in key]
    assert len(factors) * 2 == len(gradients)
    for key_a in factors:
        key_b = key_a.replace("lora_A", "lora_B")
        g_w = full[key_a.replace(".lora_A.default", "")]
        expected_b = tuning.scale * g_w @ kept[key_a].T
        expected_a = tuning.scale * kept[key_b].T @ g_w
        for found, expected in ((gradients[key_b], expected_b), (gradients[key_a], expected_a)):
            assert (found - expected).norm() <= 1e-5 * expected.norm(), key_a


@pytest.mark.parametrize("name", ["dora_head", "ia3"])
def test_layers_that_compute_again_have_the_same_gradients(policies, tiny_llama, name):
    policy, tuning = policies(name)
    again = tuned.tuned_policy(
        tiny_llama, tuning, activation_checkpointing=Checkpointing.full
    ).train()
    tuned.scatter(again.causal_lm, tuning)
    batch = collate(tuned.examples())
    (losses, gradients), (found, others) = (tuned.run(p, batch) for p in (policy, again))
    assert torch.equal(losses, found)
    for key, gradient in gradients.items():
        torch.testing.assert_close(others[key], gradient, rtol=1e-6, atol=1e-8)


def test_dropout_is_of_the_input_of_a_in_training_alone(tiny_llama):
    tuning = Lora(**SMALL, dropout=0.5)
    policy = tuned.tuned_policy(tiny_llama, tuning)
    tuned.scatter(policy.causal_lm, tuning)
    batch = collate(tuned.examples())
    with torch.no_grad():
        expected = tuned.tuned_policy(tiny_llama, replace(tuning, dropout=0.0))
        tuned.scatter(expected.causal_lm, tuning)
        assert torch.equal(policy.hidden(batch), expected.hidden(batch))
        policy.train()
        assert not torch.allclose(policy.hidden(batch), expected.hidden(batch), atol=1e-3)


def test_the_scale_and_the_rates():
    assert Lora(rank=16, alpha=32).scale == 2.0
    assert Lora(rank=16, alpha=32, rslora=True).scale == 8.0
    plus = Lora(lr_ratio_b=16.0)
    assert plus.lr_ratio("model.layers.0.mlp.up_proj.lora_B.default.weight") == 16.0
    assert plus.lr_ratio("model.layers.0.mlp.up_proj.lora_A.default.weight") == 1.0
    assert not plus.decays("q_proj.lora_magnitude_vector.default.weight", [32])
    assert plus.decays("q_proj.lora_A.default.weight", [4, 32])
    fixed = Lora(freeze_a=True)
    a = "model.layers.0.mlp.up_proj.lora_A.default.weight"
    assert not fixed.trained(a) and fixed.kept(a) and fixed.trained(a.replace("lora_A", "lora_B"))
