"""The benchmark of a 70B model, by its small shape; and what it foretells of the large one."""

import sys

import pytest
import torch

from posttrain_dist.planner.memory.parameters import stored_parameters


@pytest.fixture
def one_process(monkeypatch):
    """Variants run here: each would import everything again."""
    import qlora_70b
    import rows

    def run(command):
        monkeypatch.setattr(sys, "argv", [str(x) for x in command])
        given = qlora_70b.parse()
        variant = next(v for v in qlora_70b.VARIANTS if v.name == given.variant)
        return {"rows": qlora_70b.run_variant(qlora_70b.SHAPES["small"], variant, given.seconds)}

    monkeypatch.setattr(rows, "fresh_process", run)


def test_every_variant_runs_and_the_table_comes_last(one_process, tmp_path, monkeypatch, capsys):
    import json

    import qlora_70b
    import qlora_model

    command = ["qlora_70b.py", "--shape", "small", "--results", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as end:
        qlora_70b.main()
    printed = capsys.readouterr().out
    assert end.value.code == 0, printed
    found = [json.loads(line) for line in (tmp_path / "qlora_70b.jsonl").read_text().splitlines()]
    tokens = {
        v.name: [r["tokens"] for r in found if r["arm"] == v.name] for v in qlora_70b.VARIANTS
    }
    assert list(map(len, tokens.values())) == [4, 4, 1, 1]
    assert tokens["AdamW"] == [64, 128, 192, 384]
    shape = qlora_70b.SHAPES["small"]
    for row in found:
        job = qlora_model.planned_job(shape, row["tokens"], gpu=False)
        assert row["trained"] == sum(s.size for s in stored_parameters(job) if s.trained)
        assert abs(row["losses"][0] - 6.24) < 0.1  # ln 512
    # The same rows, the same losses: offloading and paging change no number.
    first, second = ([r["losses"] for r in found if r["arm"] == name] for name in list(tokens)[:2])
    assert first[0] == second[0] and first[0][0] != first[0][1]
    torch.testing.assert_close(torch.tensor(first[2]), torch.tensor(second[2]), rtol=1e-6, atol=0)
    last = printed.splitlines()[-len(found) - 2 :]
    assert last[0].startswith("QLoRA of the shape small on ")
    assert last[-1].startswith("paged 8-bit AdamW, offloaded")


def test_the_model_is_one_that_transformers_makes():
    """But for its quantisation: the same logits from the dequantised weights."""
    import bitsandbytes
    import qlora_model
    import transformers

    shape = qlora_model.SHAPES["small"]
    cpu = torch.device("cpu")
    model = qlora_model.make_model(shape, torch.float32, cpu, offload=False).eval()
    own = transformers.LlamaForCausalLM(qlora_model.llama_config(shape)).eval()
    found = {n.replace(".base_layer", ""): m for n, m in model.named_modules()}
    with torch.no_grad():
        for name, parameter in own.named_parameters():
            module = found[name.removesuffix(".weight")]
            weight = module.weight
            if isinstance(module, bitsandbytes.nn.Linear4bit):
                weight = bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state)
            parameter.copy_(weight)
        ids = torch.arange(40)[None]
        expected = own(ids).logits
        bounds = [0, 40]
        logits = model(
            ids,
            position_ids=torch.arange(40)[None],
            cu_seqlens=bounds,
            bounds_S=torch.tensor(bounds, dtype=torch.int32),
            max_seqlen=40,
            parent_S=[-1],
        ).logits
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)


def test_the_goals_are_near_what_is_foretold():
    import qlora_70b
    import qlora_model

    shape = qlora_70b.SHAPES["70b"]
    for variant in qlora_70b.VARIANTS[:2]:
        for tokens, goal in zip(shape.contexts, qlora_70b.GOALS[variant.offload], strict=True):
            row = {"arm": variant.name, "tokens": tokens}
            assert qlora_70b.with_goals("70b", row)["goal_bytes"] == goal * 2**30
            job = qlora_model.planned_job(shape, tokens, gpu=True, offload=variant.offload)
            assert qlora_model.foretold_bytes(job) / 2**30 == pytest.approx(goal, rel=0.13)
