"""The one command for a GPU, with tiny shapes on a CPU; and its count of FLOP."""

import json
import sys

import pytest
import torch


@pytest.mark.parametrize("model", ["8B LoRA", pytest.param("3B full", marks=pytest.mark.slow)])
def test_it_runs_every_section_and_prints_its_table_last(model, tmp_path, monkeypatch, capsys):
    import gpu
    import gpu_steps

    monkeypatch.setattr(gpu_steps, "RUNS", [run for run in gpu_steps.RUNS if run[0] == model])
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
    assert [row["model"] for row in steps] == [model]
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


def test_whole_steps_are_compared_and_a_broken_arm_takes_no_other_with_it(monkeypatch):
    import gpu_steps
    import step_data
    from tables import gpu_goals

    seconds = {"ours": 2.0, "ours again": 2.2, gpu_steps.DEFAULT: 9.0, gpu_steps.OTHERS[0]: 5.0}

    def measure(folder, sizes, arm, device, until):
        if arm not in seconds:
            raise BrokenPipeError("the arm broke\nand more")
        losses = [3.0, 2.0] if arm.startswith("ours") else [3.0, 2.2]
        return {"p50_s": seconds[arm], "losses": losses, "mfu": 0.5, "tokens_per_s": 1.0}

    written = []
    monkeypatch.setattr(gpu_steps, "measure", measure)
    monkeypatch.setattr(
        step_data, "write", lambda folder, *_: (written.append(folder.name), folder.mkdir())
    )
    monkeypatch.setattr(step_data, "write_steps", lambda *_: None)
    table = gpu_steps.all_steps("cpu", smoke=False, until=float("inf"))
    assert written == ["3B full", "8B LoRA"]
    mixed = {r["arm"]: r for r in table if (r["model"], r["kind"]) == ("3B full", "mixed")}
    assert mixed["ours"]["ours_times_faster"] == 1
    assert mixed["ours again"]["ours_times_faster"] == pytest.approx(1.1)
    assert mixed[gpu_steps.DEFAULT]["ours_times_faster"] == 4.5
    assert mixed[gpu_steps.OTHERS[0]]["loss_apart"] == pytest.approx(0.1)
    assert [arm for arm, row in mixed.items() if row.get("role") == "best"] == gpu_steps.OTHERS[:1]
    assert mixed[gpu_steps.OTHERS[1]]["failed"] == "BrokenPipeError: the arm broke"
    # Every goal of a step finds its row among them.
    rows = [{"section": "steps", "smoke": False, **row} for row in table]
    goals = [goal for goal in gpu_goals() if goal.where["section"] == "steps"]
    assert len(goals) == 4
    for goal in goals:
        matching = [row for row in rows if goal.where.items() <= row.items()]
        assert [row for row in matching if goal.reached(row)], goal.text

    late = gpu_steps.all_steps("cpu", smoke=False, until=0.0)
    assert {row["skipped"] for row in late} == {"the time of this section was spent"}
