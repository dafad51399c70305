"""The benchmark of a 70B model, by its small shape; and what it foretells of the large one."""

import sys

import pytest
import torch


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
        assert row["trained"] == qlora_model.lora_parameters(shape)
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


class Kept(torch.autograd.graph.saved_tensors_hooks):
    """Bytes that a forward keeps, each storage once, parameters left out."""

    def __init__(self, module):
        self.known = {p.untyped_storage().data_ptr() for p in module.parameters()}
        self.num_bytes, self.kept = 0, []
        super().__init__(self.pack, lambda tensor: tensor)

    def pack(self, tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.known:
            self.known.add(storage.data_ptr())
            self.kept.append(tensor)  # so that no address is used twice
            self.num_bytes += storage.nbytes()
        return tensor


def test_what_a_layer_keeps_is_foretold():
    """At the proportions of 70B: grouped keys, an MLP of 3.5 times the width."""
    import qlora_model

    shape = qlora_model.Shape(256, 1, 896, 8, 1, 512, (), 0, 0)
    dtype, tokens = torch.bfloat16, 512
    model = qlora_model.make_model(shape, dtype, torch.device("cpu"), offload=False).train()
    layer = model.model.layers[0]
    layer.gradient_checkpointing = False
    inputs = torch.randn(1, tokens, 256, dtype=dtype, requires_grad=True)
    positions = torch.arange(tokens)[None]
    row = {"bounds_S": torch.tensor([0, tokens], dtype=torch.int32), "parent_S": [-1]}
    row |= {"cu_seqlens": [0, tokens], "max_seqlen": tokens, "position_ids": positions}
    kept = Kept(model)
    with kept:
        layer(inputs, position_embeddings=model.model.rotary_emb(inputs, positions), **row)
    foretold = qlora_model.kept_by_layer(shape, dtype.itemsize)
    assert kept.num_bytes / tokens == pytest.approx(foretold, rel=0.01)


def test_the_goals_are_near_what_is_foretold():
    import qlora_70b
    import qlora_model

    shape = qlora_70b.SHAPES["70b"]
    for variant in qlora_70b.VARIANTS[:2]:
        for tokens, goal in zip(shape.contexts, qlora_70b.GOALS[variant.offload], strict=True):
            row = {"arm": variant.name, "tokens": tokens}
            assert qlora_70b.with_goals("70b", row)["goal_bytes"] == goal * 2**30
            foretold = qlora_model.foretold_bytes(
                shape, tokens, torch.bfloat16, offload=variant.offload, state_bits=32
            )
            assert foretold / 2**30 == pytest.approx(goal, rel=0.13)
