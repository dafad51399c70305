"""A model is itself again, bit for bit, after adapters were put into it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from posttrain_dist.evaluation.restored_model import restored


@pytest.mark.parametrize("changes", ["lora", "pissa", "class", "freeze"])
def test_a_restored_model_is_bit_equal(tiny_llama: Path, changes: str) -> None:
    import peft

    model = AutoModelForCausalLM.from_pretrained(tiny_llama).eval()
    ids = torch.tensor([[3, 50, 9, 120]])
    with torch.no_grad():
        before = model(ids).logits
    names = [name for name, _ in model.named_parameters()]
    with restored(model):
        if changes in ("lora", "pissa"):
            options = {"lora": False, "pissa": "pissa"}
            config = peft.LoraConfig(
                r=2, target_modules=["q_proj", "lm_head"], init_lora_weights=options[changes]
            )
            peft.inject_adapter_in_model(config, model)
            model.model.register_forward_hook(lambda module, args, output: None)
        elif changes == "class":
            mlp = model.model.layers[0].mlp
            mlp.__class__ = type("Other", (type(mlp),), {"forward": lambda self, x: x * 2})
            mlp.add_module("more", torch.nn.Linear(2, 2))
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        with torch.no_grad():
            inside = model(ids).logits
        if changes in ("lora", "class"):
            assert not torch.equal(inside, before), "a change that shows nothing proves nothing"
    with torch.no_grad():
        assert torch.equal(model(ids).logits, before)
    assert [name for name, _ in model.named_parameters()] == names
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not model.model._forward_hooks
