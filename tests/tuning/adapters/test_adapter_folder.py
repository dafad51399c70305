"""An adapter folder: plain peft loads it, and each fault of one is named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from posttrain_dist.errors import CheckpointError, ModelError
from posttrain_dist.tuning.adapters import adapter_writer
from posttrain_dist.tuning.adapters.adapter_folder import find_adapter, read_adapter, read_facts
from posttrain_dist.tuning.adapters.adapter_writer import (
    AdapterFacts,
    check_adapter,
    class_of,
    write_adapter,
)
from posttrain_dist.tuning.adapters.base_check import check_base
from posttrain_dist.tuning.adapters.base_digest import base_digest
from posttrain_dist.tuning.base import SavedAdapter

IDS = torch.tensor([[5, 9, 14, 30, 77, 8]])
FACTS = AdapterFacts("lora", "d", tuning={"rank": 4}, channels=["copy"], run="run-1", step=7)


@pytest.fixture(scope="module")
def made(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """What plain peft saves of a LoRA with random A and B, and the logits that it gives."""
    import peft
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    targets = ["q_proj", "down_proj"]
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=targets, task_type="CAUSAL_LM")
    tuned = peft.get_peft_model(model, config).eval()
    torch.manual_seed(3)
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    folder = tmp_path_factory.mktemp("peft")
    tuned.save_pretrained(folder)
    with torch.no_grad():
        return folder, tuned(IDS).logits


@pytest.fixture(scope="module")
def saved(made: tuple[Path, Any]) -> SavedAdapter:
    return read_adapter(made[0])


@pytest.fixture(scope="module")
def good(saved: SavedAdapter, tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same adapter as our own folder."""
    facts = AdapterFacts("lora", base_digest(tiny_llama), channels=["copy"], run="run-1", step=7)
    return write_adapter(tmp_path_factory.mktemp("ours") / "adapter", saved, tiny_llama, facts)


def test_plain_peft_loads_what_is_written(good: Path, made: Any, tiny_llama: Path) -> None:
    import peft
    import transformers

    base = transformers.AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    with torch.no_grad():
        alone = base(IDS).logits
        logits = peft.PeftModel.from_pretrained(base, good).eval()(IDS).logits
    assert torch.equal(logits, made[1]) and float((logits - alone).abs().max()) > 0.1
    config = json.loads((good / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tiny_llama)
    card = (good / "README.md").read_text()
    assert "| effective scale | 1.5 (alpha 6 / rank 4) |" in card
    assert (
        "vLLM, with `--enable-lora --max-lora-rank 8`" in card
        and "| data channels | copy |" in card
    )
    assert (good / "adapter_model.safetensors").stat().st_mode & 0o777 == 0o666 & ~_umask()
    assert sorted(p.name for p in good.parent.iterdir()) == ["adapter"]  # no partial, no older one


def _umask() -> int:
    import os

    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_what_is_read_is_what_was_written(good: Path, saved: SavedAdapter) -> None:
    again = read_adapter(good)
    assert again.config["r"] == 4 and again.tensors.keys() == saved.tensors.keys()
    assert all(torch.equal(again.tensors[name], saved.tensors[name]) for name in saved.tensors)
    assert read_facts(good)["step"] == 7
    (run := good.parent / "run").mkdir()
    shutil.copytree(good, run / "adapter")
    assert find_adapter(run) == run / "adapter"
    shutil.rmtree(run)


# ---------------------------------------------------------------------------------- bad folders


def change_tensors(folder: Path, change: Any) -> None:
    from safetensors.torch import load_file, save_file

    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors, next(name for name in sorted(tensors) if "lora_A" in name))
    save_file(tensors, file)


def put(value: torch.Tensor) -> Any:
    return lambda tensors, name: tensors.__setitem__(name, value)


def make_nan(tensors: dict[str, torch.Tensor], name: str) -> None:
    tensors[name][1, 2] = float("nan")


def rewrite(name: str, content: bytes) -> Any:
    return lambda folder: (folder / name).write_bytes(content)


def cut(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-7])


def as_pickle(folder: Path) -> None:
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


def without(name: str) -> Any:
    return lambda folder: (folder / name).unlink()


WEIGHTS = "adapter_model.safetensors"
FAULTS = {
    "config": (without("adapter_config.json"), "holds no adapter"),
    "json": (rewrite("adapter_config.json", b"{"), "cannot be read"),
    "list": (rewrite("adapter_config.json", b"[]"), "not a JSON object"),
    "method": (rewrite("adapter_config.json", b"{}"), "names no method"),
    "no file": (without(WEIGHTS), "has no tensors"),
    "pickle": (as_pickle, "adapter_model.bin is not read"),
    "cut": (cut, "truncated or damaged"),
    "lfs": (rewrite(WEIGHTS, b"version https://git-lfs"), "Git LFS pointer"),
    "nan": (lambda f: change_tensors(f, make_nan), "NaN or infinity"),
    "empty": (lambda f: change_tensors(f, put(torch.zeros(0))), r"is empty, of shape \[0\]"),
    "shape": (lambda f: change_tensors(f, put(torch.ones(4, 3))), r"is \[4, 3\], and was \[4, "),
    "whole numbers": (lambda f: change_tensors(f, put(torch.ones(4, 32).int())), "floating"),
    "missing": (lambda f: change_tensors(f, lambda t, name: t.pop(name)), "not there"),
    "name": (
        lambda f: change_tensors(f, lambda t, _: t.update({"a/../../b": torch.ones(1)})),
        "names a tensor as no method",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_bad_folder_is_refused_with_the_fault(fault: str, good: Path, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    shutil.copytree(good, folder)
    damage, match = FAULTS[fault]
    damage(folder)
    with pytest.raises(ModelError, match=match):
        read_adapter(folder)


def test_a_matrix_of_peft_without_its_counterpart_is_missed(made: Any, tmp_path: Path) -> None:
    shutil.copytree(made[0], tmp_path / "a")
    change_tensors(tmp_path / "a", lambda t, name: t.pop(name.replace("lora_A", "lora_B")))
    with pytest.raises(ModelError, match=r"lacks .*lora_B.weight, the counterpart"):
        read_adapter(tmp_path / "a")


# -------------------------------------------------------------------------------------- writing


def changed(saved: SavedAdapter, part: str, make: Any) -> SavedAdapter:
    tensors = {n: make(t.clone()) if part in n else t for n, t in saved.tensors.items()}
    return SavedAdapter(saved.config, tensors)


@pytest.mark.parametrize(
    ("part", "make", "match"),
    [
        ("lora_B", torch.zeros_like, "nothing was trained: every tensor lora_B"),
        ("lora_A", lambda t: t.fill_(float("inf")), "NaN or infinity"),
        ("q_proj", lambda t: t[:0], "is empty"),
    ],
)
def test_a_bad_adapter_is_not_written(
    part: str, make: Any, match: str, saved: SavedAdapter, tiny_llama: Path, tmp_path: Path
) -> None:
    bad = changed(saved, part, make)
    with pytest.raises(CheckpointError, match=match):
        write_adapter(tmp_path / "a", bad, tiny_llama, FACTS)
    assert not list(tmp_path.iterdir())


def test_before_the_first_update_lora_b_may_be_zero(
    saved: SavedAdapter, tiny_llama: Path, tmp_path: Path
) -> None:
    first = changed(saved, "lora_B", torch.zeros_like)
    write_adapter(tmp_path / "a", first, tiny_llama, FACTS, trained=False)
    with pytest.raises(CheckpointError, match="nothing was trained"):
        check_adapter(tmp_path / "a")
    one = changed(saved, "layers.0.self_attn.q_proj.lora_B", torch.zeros_like)
    write_adapter(tmp_path / "a", one, tiny_llama, FACTS)  # others were trained; the older goes
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_write_that_fails_leaves_what_was_there(
    saved: SavedAdapter, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.partial" / "prompt-0").mkdir(parents=True)  # of a process that was killed
    (tmp_path / "a.partial" / "prompt-0" / "adapter_config.json").write_text("{}")
    write_adapter(tmp_path / "a", saved, tiny_llama, FACTS)
    assert not (tmp_path / "a" / "prompt-0").exists()

    def full(folder: Path) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(CheckpointError, match="no space left on device"):
        write_adapter(tmp_path / "a", saved, tiny_llama, FACTS, carry=full)
    monkeypatch.setattr(adapter_writer, "commit_folder", lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_adapter(tmp_path / "a", saved, tiny_llama, FACTS)
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    check_adapter(tmp_path / "a")


def test_class_of_tensors() -> None:
    names = {
        "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight": "lora_A",
        "base_model.model.model.layers.11.mlp.down_proj.ia3_l": "ia3_l",
        "model.layers.0.output_adapters.adapters.default.adapter_down.0.bias": "adapter_down",
        "prompt_embeddings": "prompt_embeddings",
    }
    assert {name: class_of(name) for name in names} == names


def test_the_prompts_of_an_ensemble_are_folders_that_come_back_as_one(
    tiny_llama: Path, tmp_path: Path
) -> None:
    import peft
    import transformers

    config = {
        "peft_type": "PROMPT_TUNING",
        "task_type": "CAUSAL_LM",
        "num_virtual_tokens": 2,
        "token_dim": 32,
        "num_transformer_submodules": 1,
        "num_attention_heads": 4,
        "num_layers": 2,
        "posttrain_ensemble": 11,
    }
    rows = torch.randn(22, 32, generator=torch.Generator().manual_seed(0))
    saved = SavedAdapter(config, {"prompt_embeddings": rows})
    facts = AdapterFacts("prompt", "d")
    write_adapter(tmp_path / "a", saved, tiny_llama, facts, carry=lambda f: (f / "x").touch())
    again = read_adapter(tmp_path / "a")  # prompt-10 stands behind prompt-9
    assert torch.equal(again.tensors["prompt_embeddings"], rows)
    assert again.config["posttrain_ensemble"] == 11
    assert (tmp_path / "a" / "prompt-10" / "x").is_file()
    part = json.loads((tmp_path / "a" / "prompt-3" / "adapter_config.json").read_text())
    assert not [key for key in part if key.startswith("posttrain")]
    base = transformers.AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    words = base.get_input_embeddings()(IDS)
    with torch.no_grad():
        expected = base(inputs_embeds=torch.cat([rows[None, 6:8], words], 1)).logits
        tuned = peft.PeftModel.from_pretrained(base, tmp_path / "a" / "prompt-3").eval()
        torch.testing.assert_close(tuned(IDS).logits, expected, rtol=1e-5, atol=1e-5)


# ----------------------------------------------------------------------------------- the base


@pytest.fixture(scope="module")
def other(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base model with one value of one matrix changed: its last one."""
    from safetensors.torch import load_file, save_file

    folder = tmp_path_factory.mktemp("other") / "model"
    shutil.copytree(tiny_llama, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][-1, -1] += 1
    save_file(tensors, folder / "model.safetensors")
    return folder


def test_an_adapter_of_another_base_is_refused_by_digest(
    good: Path, tiny_llama: Path, other: Path
) -> None:
    assert check_base(good, tiny_llama) == ""
    with pytest.raises(ModelError, match="is another model") as error:
        check_base(good, other)
    assert str(tiny_llama) in str(error.value) and str(other) in str(error.value)


def test_the_digest_is_of_network_and_weights_alone(
    tiny_llama: Path, other: Path, tmp_path: Path
) -> None:
    import transformers

    digest = base_digest(tiny_llama)
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_llama)
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")  # without a tokenizer
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    assert base_digest(tmp_path / "shards") == digest != base_digest(other)
    config = json.loads((tiny_llama / "config.json").read_text())
    shutil.copytree(tiny_llama, tmp_path / "eps")
    (tmp_path / "eps" / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-2}))
    assert base_digest(tmp_path / "eps") != digest
    assert base_digest(tiny_llama, has_weights=False).startswith("random-")


def test_a_folder_of_plain_peft_is_compared_by_sizes(
    made: Any, tiny_llama: Path, other: Path, builders: Any, tmp_path: Path
) -> None:
    said = [check_base(made[0], base) for base in (tiny_llama, other)]
    assert said[0].endswith("its weights were not compared")
    assert said[1].endswith(f"not compared; and its own base model is called {tiny_llama}")
    for name, sizes, match in (
        ("wide", {"intermediate_size": 64}, r"down_proj.lora_A.*beside a weight \(32, 64\)"),
        ("flat", {"num_hidden_layers": 1}, "there is no module model.layers.1"),
    ):
        with pytest.raises(ModelError, match=match):
            check_base(made[0], builders.model(tmp_path / name, **sizes))
    import peft
    import transformers

    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 300, "bos_token_id": 0}
    gpt2 = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, eos_token_id=0))
    gpt2.save_pretrained(tmp_path / "gpt2")  # its linears lie the other way round
    config = peft.LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True)
    peft.get_peft_model(gpt2, config).save_pretrained(tmp_path / "lora")
    assert "sizes fit" in check_base(tmp_path / "lora", tmp_path / "gpt2")
    with pytest.raises(ModelError, match="there is no module transformer"):
        check_base(tmp_path / "lora", other)
