"""IA3: what its vectors scale, by the formula of the paper."""

from __future__ import annotations

import torch
import tuned_models as tuned
from small_configs import small_config

from posttrain_dist.tuning.ia3 import Ia3
from posttrain_dist.tuning.lora import Lora


def test_vectors_get_no_weight_decay():
    assert not Ia3().decays("model.layers.0.self_attn.k_proj.ia3_l.default", [16, 1])
    assert not Ia3().decays("model.layers.0.mlp.down_proj.ia3_l.default", [1, 48])


def test_keys_values_and_the_inside_of_the_mlp_are_scaled(tiny_llama):
    """k and v of the plain model times l_k and l_v, and the MLP's inside times l_ff."""
    import transformers

    tuning = Ia3()
    policy = tuned.tuned_policy(tiny_llama, tuning)
    tuned.scatter(policy.causal_lm, tuning, 0.5)
    kept = tuned.kept_of(policy, tuning)
    own = transformers.AutoModelForCausalLM.from_pretrained(tiny_llama, attn_implementation="eager")
    assert len(kept) == 6

    def scale_output(vector):
        return lambda module, args, output: output * vector.flatten()

    def scale_input(vector):
        return lambda module, args: (args[0] * vector.flatten(),)

    for name, vector in kept.items():
        module = own.get_submodule(name.removesuffix(".ia3_l.default"))
        if name.split(".")[-3] == "down_proj":
            assert vector.shape == (1, 48)
            module.register_forward_pre_hook(scale_input(vector))
        else:
            assert vector.shape == (16, 1) and name.split(".")[-3] in ("k_proj", "v_proj")
            module.register_forward_hook(scale_output(vector))
    row = tuned.examples()[1]
    with torch.no_grad():
        expected = own(input_ids=torch.from_numpy(row.input_ids_L).long()[None]).logits[0]
    torch.testing.assert_close(tuned.policy_logits(policy, row), expected, rtol=1e-5, atol=1e-5)


def test_gpt2_whose_weights_are_turned_and_square_is_merged_right(tmp_path):
    """attn.c_proj is 32 x 32: only config.json says which way; files leave out `transformer.`."""
    import pytest
    import transformers
    from safetensors.torch import load_file

    torch.manual_seed(3)
    config = small_config("gpt2")
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    base = load_file(tmp_path / "model.safetensors")
    row = tuned.examples()[1]
    ids = torch.from_numpy(row.input_ids_L).long()[None]
    for tuning in (Lora(rank=4), Lora(rank=4, dora=True), Ia3(targets=["c_proj", "c_attn"])):
        policy = tuned.tuned_policy(tmp_path, tuning)
        tuned.scatter(policy.causal_lm, tuning)
        kept, network = tuned.kept_of(policy, tuning), policy.config.to_dict()
        short = {name.removeprefix("transformer."): w for name, w in base.items()}
        merged = {n: tuning.merge(n, w, kept, network) for n, w in short.items()}
        own = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path, attn_implementation="eager"
        ).eval()
        own.load_state_dict({f"transformer.{n}": w for n, w in merged.items()}, strict=False)
        with torch.no_grad():
            logits = own(input_ids=ids).logits[0]
        torch.testing.assert_close(tuned.policy_logits(policy, row), logits, rtol=1e-5, atol=2e-5)
        with pytest.raises(AssertionError, match="network"):
            tuning.merge("h.0.attn.c_proj.weight", short["h.0.attn.c_proj.weight"], kept)
        saved = tuning.to_adapter(kept, network)
        folder = tuned.write_folder(tmp_path / str(len(list(tmp_path.iterdir()))), saved, tmp_path)
        expected = tuned.peft_logits(tmp_path, folder, ids[0])
        torch.testing.assert_close(expected, logits, rtol=1e-5, atol=2e-5)
