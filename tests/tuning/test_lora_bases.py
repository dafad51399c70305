"""LoRA and IA3 on a base in bfloat16 and in NF4, and on a compiled one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import tuned_models as tuned

from posttrain_dist.config import Full
from posttrain_dist.data.packs.collate import collate
from posttrain_dist.models.attention import EAGER, register
from posttrain_dist.models.compiled import compile_layers
from posttrain_dist.models.policy import Policy
from posttrain_dist.tuning.ia3 import Ia3
from posttrain_dist.tuning.lora import Lora

TUNINGS = [
    Lora(rank=4, targets=["q_proj", "down_proj", "lm_head"]),
    Lora(rank=4, dora=True),
    Ia3(),
]


@pytest.fixture(scope="module")
def wide_llama(tmp_path_factory, builders) -> Path:
    """Rows of 64: a block of NF4."""
    folder = tmp_path_factory.mktemp("wide")
    return builders.model(folder, hidden_size=64, intermediate_size=128, head_dim=16)


@pytest.mark.parametrize("tuning", TUNINGS)
def test_adapters_have_the_dtype_of_a_base_in_16_bits(tiny_llama, tuning):
    policy = tuned.tuned_policy(tiny_llama, tuning, dtype=torch.bfloat16)
    batch = collate(tuned.examples())
    with torch.no_grad():
        base = tuned.tuned_policy(tiny_llama, Full(), dtype=torch.bfloat16).hidden(batch)
        assert torch.equal(policy.hidden(batch), base)
    tuned.scatter(policy.causal_lm, tuning)
    _, gradients = tuned.run(policy, batch)
    assert {g.dtype for g in gradients.values()} == {torch.bfloat16}
    # The head has logits in float32 where a CPU has no products of 16 bits; the model has not.
    assert policy.check_head(batch) < 3e-2
    # As exact as its own float32 twin allows: 16 bits round at 2^-9.
    twin = tuned.tuned_policy(tiny_llama, tuning)
    own = dict(policy.causal_lm.named_parameters())
    with torch.no_grad():
        for name, parameter in twin.causal_lm.named_parameters():
            parameter.copy_(own[name])
    _, expected = tuned.run(twin, batch)
    for name, gradient in gradients.items():
        assert (gradient - expected[name]).norm() < 0.1 * expected[name].norm(), name


def nf4_model(folder: Path, dtype: torch.dtype):
    import transformers

    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=dtype,
    )
    register()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=config, dtype=dtype, attn_implementation=EAGER
    )
    for module in model.modules():  # it would repack the weight in evaluation
        if type(module).__name__ == "Linear4bit":
            module.support_avx512bf16_for_cpu = False
    return model


@pytest.mark.parametrize("tuning", TUNINGS)
def test_on_an_nf4_base_it_is_lora_on_the_dequantised_weights(wide_llama, tuning):
    from bitsandbytes.functional import dequantize_4bit

    batch = collate(tuned.examples())
    model = nf4_model(wide_llama, torch.bfloat16)
    plain = tuned.tuned_policy(wide_llama, tuning, dtype=torch.bfloat16)
    tuning.attach(model)
    policy = Policy(model, tuned.KERNELS, 1, tuning).eval()
    own = dict(plain.causal_lm.named_parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            packed = type(parameter).__name__ == "Params4bit"
            assert packed == (".layers." in name and "proj" in name and not tuning.trained(name))
            if packed:
                own[name].copy_(dequantize_4bit(parameter, parameter.quant_state))
        tuned.scatter(plain.causal_lm, tuning)
        for name, parameter in model.named_parameters():
            if tuning.trained(name):
                parameter.copy_(own[name])
    (losses, gradients), (found, others) = (tuned.run(p, batch) for p in (plain, policy))
    torch.testing.assert_close(found, losses, rtol=2e-2, atol=2e-2)
    assert gradients.keys() == others.keys()
    for name, gradient in gradients.items():
        assert others[name].dtype == torch.bfloat16
        assert (gradient - others[name]).norm() < 0.05 * gradient.norm(), name


@pytest.mark.slow
@pytest.mark.parametrize("tuning", TUNINGS)
def test_compiled_layers_have_the_same_losses_and_gradients(tiny_llama, tuning):
    policy, compiled = (tuned.tuned_policy(tiny_llama, tuning) for _ in range(2))
    for each in (policy, compiled):
        tuned.scatter(each.causal_lm, tuning)
    compile_layers(compiled.causal_lm, backend="aot_eager")
    batch = collate(tuned.examples())
    (losses, gradients), (found, others) = (tuned.run(p, batch) for p in (policy, compiled))
    torch.testing.assert_close(found, losses, rtol=1e-6, atol=2e-6)
    for name, gradient in gradients.items():
        assert (gradient - others[name]).norm() <= 2e-6 * gradient.norm(), name
