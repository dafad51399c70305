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
    assert [row["model"] for row in steps] == ["3B full", "8B LoRA"]
    for row in steps:
        assert min(row["norms"]) > 0
        assert abs(row["losses"][0] - 7.62) < 0.05  # ln 2048
    last = printed.splitlines()[-20:]
    assert any(line.startswith("N=64 frozen 90% masked: floor") for line in last)
    assert len(printed) < 12_000  # a terminal still shows it


@pytest.mark.parametrize("rank", [0, 2])
def test_model_flop_are_those_that_torch_counts(rank):
    """torch counts attention without the causal half, and the first layer's frozen input."""
    import step_data
    from gpu_steps import LLAMA_3B, LLAMA_8B, layer_parameters, model_flops, tiny
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import LlamaForCausalLM

    sizes = tiny(LLAMA_8B if rank else LLAMA_3B)
    config = step_data.llama_config(sizes)
    config._attn_implementation = "eager"
    model, length = LlamaForCausalLM(config), 48
    if rank:
        from peft import inject_adapter_in_model

        model.requires_grad_(False)
        inject_adapter_in_model(step_data.lora(rank), model)
        model.enable_input_require_grads()
    inside = {n: p.numel() for n, p in model.named_parameters() if "layers." in n}
    lora = sum(number for name, number in inside.items() if "lora_" in name)
    assert layer_parameters(sizes) == (sum(inside.values()) - lora, lora)
    ids = torch.randint(sizes.vocabulary, (1, length))
    with FlopCounterMode(display=False) as counter:
        model(ids, labels=ids, use_cache=False).loss.backward()
    attention = 6 * sizes.layers * sizes.hidden * length**2
    norms = sum(p.numel() for n, p in model.named_parameters() if "layernorm" in n)
    # The head of torch computes the last row too, which no label waits for.
    ids_L = ids[0].tolist()
    sample = step_data.Sample(input_ids=ids_L, labels=[0, *ids_L], channel=0)
    expected = counter.get_total_flops() - attention
    # Norms are no products; they are counted with the parameters of the layers.
    more = (4 if rank else 6) * norms * length
    assert model_flops(sizes, [sample]) == pytest.approx(expected + more, rel=0.03)
