"""Loading: sharded over the ranks, whole or not at all."""

from __future__ import annotations

import json
import re
from contextlib import nullcontext

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from posttrain_dist.errors import ModelError
from posttrain_dist.models import ModelConfig, Weights
from posttrain_dist.models.load import load_model


def test_no_rank_holds_the_whole_model_in_private_memory(tmp_path, builders, run_workers):
    # Matrices above 32 MiB, as real models have: glibc keeps smaller freed pieces to itself.
    # At its peak a rank holds its half, and three matrices on their way.
    size = {"hidden_size": 1024, "intermediate_size": 8448, "num_hidden_layers": 6, "head_dim": 64}
    config = transformers.LlamaConfig(**builders.size | size, vocab_size=300)
    with torch.device("meta"):
        shapes = transformers.LlamaForCausalLM(config).state_dict()
    folder = tmp_path / "model"
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    weights = {name: torch.zeros(t.shape) for name, t in shapes.items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    whole = sum(weight.nbytes for weight in weights.values())
    assert whole > 350e6
    for output in run_workers("load_sharded.py", 2, folder):
        seen = json.loads(re.search(r"MEMORY (.*)", output).group(1))
        assert seen["held"] == pytest.approx(whole / 2, rel=0.01)
        assert seen["peak"] < 0.8 * whole, (seen, whole)


def load(folder, weights=Weights.load, seed=0):
    config = ModelConfig(path=str(folder), weights=weights)
    return load_model(config, folder, dtype=torch.float32, seed=seed, materialise=nullcontext())


def test_weights_are_those_of_the_file(tiny_llama):
    saved = load_file(tiny_llama / "model.safetensors")
    loaded = dict(load(tiny_llama).named_parameters())
    assert loaded.keys() == saved.keys()
    assert all(torch.equal(loaded[name], saved[name]) for name in saved)


def test_random_weights_follow_the_seed_and_read_no_file(tmp_path, builders):
    folder = builders.model(tmp_path / "model")
    saved = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    (folder / "model.safetensors").unlink()
    first, again, other = (load(folder, Weights.random, seed) for seed in (1, 1, 2))
    weights = [model.get_input_embeddings().weight for model in (first, again, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2]) and not torch.equal(weights[0], saved)


def test_a_missing_weight_is_named_not_made_up(tmp_path, builders):
    folder = builders.model(tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"weights are not in the files: .*layers.1.mlp.up_proj"):
        load(folder)
