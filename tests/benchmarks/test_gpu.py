"""The one command for a GPU, with tiny shapes on a CPU; and its count of FLOP."""

import json
import sys

import pytest
import torch


def test_it_runs_every_section_and_prints_its_table_last(tmp_path, monkeypatch, capsys):
    import gpu

    monkeypatch.setattr(sys, "argv", ["gpu.py", "--smoke", "--results", str(tmp_path)])
    with pytest.raises(SystemExit) as end:
        gpu.main()
    assert end.value.code == 0
    printed = capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "gpu.jsonl").read_text().splitlines()]
    checks = [row for row in rows if row["section"] == "kernels"]
    assert len(checks) == 2
    assert all(row["weight_error"] < 1e-5 and not row["wrong"] for row in checks)
    heads = [row for row in rows if row["section"] == "head" and row["arm"] == "ours"]
    cases = {(row["rows"], row["head"], row["masked"]) for row in heads}
    assert len(cases) == len(heads) == 2 * 2 * 3
    assert all(row["gradient_error"] < 1e-5 for row in heads)
    steps = [row for row in rows if row["section"] == "steps"]
    assert [(row["model"], row["masked"]) for row in steps] == [
        ("3B full", 0.0),
        ("3B full", 0.7),
        ("8B LoRA", 0.0),
        ("8B LoRA", 0.7),
    ]
    assert all(row["norm"] > 0 and abs(row["loss"] - 5.55) < 0.05 for row in steps)  # ln 256
    last = printed.splitlines()[-20:]
    assert any(line.startswith("N=64 frozen 90% masked: floor") for line in last)
    assert len(printed) < 12_000  # a terminal still shows it


@pytest.mark.parametrize("rank", [0, 2])
def test_model_flop_are_those_that_torch_counts(rank):
    """torch counts attention without the causal half, and the first layer's frozen input."""
    from gpu_steps import LLAMA_3B, LLAMA_8B, model_flops, tiny
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = tiny(LLAMA_8B if rank else LLAMA_3B)
    config = LlamaConfig(
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        intermediate_size=shape.feed_forward,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        vocab_size=shape.vocabulary,
        tie_word_embeddings=shape.tied,
        attn_implementation="eager",
    )
    model, length = LlamaForCausalLM(config), 48
    if rank:
        from peft import LoraConfig, inject_adapter_in_model

        targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        inject_adapter_in_model(LoraConfig(r=rank, target_modules=targets), model)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("lora_" in name)
        model.enable_input_require_grads()
    ids = torch.randint(shape.vocabulary, (1, length))
    with FlopCounterMode(display=False) as counter:
        model(ids, labels=ids, use_cache=False).loss.backward()
    attention = 6 * shape.layers * shape.hidden * length**2
    norms = sum(p.numel() for n, p in model.named_parameters() if "layernorm" in n)
    expected = counter.get_total_flops() - attention
    made = model_flops(shape, model, [length], length)
    # Norms are no products; they are counted with the parameters of the layers.
    assert made == pytest.approx(expected + (4 if rank else 6) * norms * length, rel=0.03)
