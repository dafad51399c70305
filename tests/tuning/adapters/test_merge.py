"""Merging into a base model's files: names, rounding, NF4, and memory."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from posttrain_dist.errors import ConfigError, ModelError
from posttrain_dist.tuning.adapters.base_tensors import Nf4Linears, base_tensors
from posttrain_dist.tuning.adapters.merged_tensors import (
    MergeInto,
    merged_tensors,
    refuse_unmergeable,
)
from posttrain_dist.tuning.base import AdapterTuning, Tuning


class AddKept(AdapterTuning):
    """Adds to each weight what is kept under its name."""

    def merge(
        self,
        name: str,
        weight: torch.Tensor,
        kept: Mapping[str, torch.Tensor],
        network: Mapping[str, Any] | None = None,
    ) -> torch.Tensor:
        assert network is not None and network["model_type"] == "llama"
        change = kept.get(name)
        return weight if change is None else (weight.float() + change).to(weight.dtype)


class Mlp(AdapterTuning):
    """What no weight can take in."""

    @property
    def unmergeable(self) -> str:
        return "it has a function between its matrices"


def shard(folder: Path, per_file: int) -> None:
    """Spread the tensors of a folder over many files, with an index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map, names = {}, list(tensors)
    for start in range(0, len(names), per_file):
        file = f"model-{start:05d}.safetensors"
        save_file({n: tensors[n] for n in names[start : start + per_file]}, folder / file)
        weight_map |= dict.fromkeys(names[start : start + per_file], file)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_every_tensor_comes_once_with_its_change_in_it(tmp_path: Path, builders: Any) -> None:
    folder = builders.model(tmp_path / "base")
    tensors = load_file(folder / "model.safetensors")
    shard(folder, 3)
    name = "model.layers.1.mlp.up_proj.weight"
    kept = {name: torch.randn(tensors[name].shape) * 1e-3}
    stream = merged_tensors(folder, AddKept(), kept, dtype=torch.float32)
    found = {key: tensor.clone() for key, tensor in stream}
    assert list(found) == list(tensors)
    for key, tensor in tensors.items():
        expected = tensor + kept[key] if key in kept else tensor
        assert torch.equal(found[key], expected), key


def test_a_change_below_the_bases_own_rounding_is_kept(tmp_path: Path, builders: Any) -> None:
    folder = builders.model(tmp_path / "base")
    tensors = load_file(folder / "model.safetensors")
    save_file({k: t.bfloat16() for k, t in tensors.items()}, folder / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    kept = {name: torch.full(tensors[name].shape, 1e-6)}
    found = dict(merged_tensors(folder, AddKept(), kept, dtype=torch.float32))
    assert torch.equal(found[name], tensors[name].bfloat16().float() + 1e-6)
    # Where 16 bits are written, the sum is rounded once.
    rounded = dict(merged_tensors(folder, AddKept(), kept, dtype=torch.bfloat16))[name].bfloat16()
    assert torch.equal(rounded, (tensors[name].bfloat16().float() + 1e-6).bfloat16())


def test_what_belongs_to_no_tensor_is_an_error(tiny_llama: Path) -> None:
    kept = {"model.layers.7.mlp.up_proj.weight": torch.ones(1)}
    with pytest.raises(ModelError, match=r"1 trained tensors belong to no tensor.*layers\.7"):
        list(merged_tensors(tiny_llama, AddKept(), kept, dtype=torch.float32))


def test_what_cannot_be_merged_is_refused_with_its_reason() -> None:
    with pytest.raises(ConfigError, match="cannot be merged: it has a function between"):
        refuse_unmergeable(Mlp(), "--merge")
    with pytest.raises(ConfigError, match="there is nothing to merge"):
        refuse_unmergeable(Tuning(), "--merge")
    refuse_unmergeable(AddKept(), "--merge")


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory, builders: Any) -> Path:
    """A base whose rows are blocks of NF4."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
    return builders.model(tmp_path_factory.mktemp("wide"), **sizes)


def nf4_model(folder: Path) -> Any:
    import transformers

    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, quantization_config=config
    )


def test_nf4_is_what_a_quantised_model_holds_and_stores(wide: Path, tmp_path: Path) -> None:
    from bitsandbytes import functional

    model = nf4_model(wide)
    held = {
        name: functional.dequantize_4bit(p.data, p.quant_state)
        if hasattr(p, "quant_state")
        else p.data
        for name, p in model.named_parameters()
    }
    original = load_file(wide / "model.safetensors")
    changed = [name for name in original if not torch.equal(original[name], held[name])]
    linears = Nf4Linears(wide)
    assert sorted(changed) == sorted(name for name in original if name in linears)
    assert len(changed) == 2 * 7

    # The change is added to what the adapter was trained beside.
    name = "model.layers.1.self_attn.o_proj.weight"
    kept = {name: torch.randn(original[name].shape) * 1e-3}
    into = MergeInto.dequantised
    found = dict(merged_tensors(wide, AddKept(), kept, dtype=torch.float32, into=into))
    for key in original:
        assert torch.equal(found[key], held[key] + kept.get(key, 0)), key

    # A folder that stores NF4 gives the same numbers, and no scales.
    model.save_pretrained(tmp_path / "stored")
    stored = {key: tensor.float() for key, tensor in base_tensors(tmp_path / "stored")}
    assert sorted(stored) == sorted(original)
    for key, tensor in stored.items():
        assert torch.equal(tensor, held[key]), key


def test_memory_is_one_shard_and_one_tensor(
    tmp_path: Path, builders: Any, run_workers: Callable[..., list[str]]
) -> None:
    """256 MB are merged and written where 112 MB more may be allocated."""
    folder = builders.model(tmp_path / "base")
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for number in range(0, 128, 8):
        file = f"model-{number:05d}.safetensors"
        names = [f"w{number + each:03d}" for each in range(8)]
        filled = [torch.full((512, 2048), float(n[1:]), dtype=torch.bfloat16) for n in names]
        save_file(dict(zip(names, filled, strict=True)), folder / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    shard_bytes, limit = 16 << 20, 112 << 20
    (said,) = run_workers("merge_limited.py", 1, folder, tmp_path / "out", shard_bytes, limit)
    assert said.split() == ["merged", "limited"]
    written = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(written) == 16
    found = {name: tensor for file in written for name, tensor in load_file(file).items()}
    for name, tensor in found.items():
        assert tensor.unique().tolist() == [float(name[1:]) + 1]
    assert len(found) == 128
