"""Tensors that a tuning leaves in memory, byte for byte those of the model that is attached."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
import tuned_models as tuned

from posttrain_dist.config import (
    Bottleneck,
    Dtype,
    Full,
    Ia3,
    Lora,
    ModelConfig,
    Prefix,
    Prompt,
    PTuning,
    Quantize,
    RunConfig,
    complete,
)
from posttrain_dist.planner.machine import find_machine
from posttrain_dist.planner.make_job import make_job
from posttrain_dist.planner.memory.parameters import CONSTANTS, stored_parameters
from posttrain_dist.planner.plan import Item
from posttrain_dist.tuning.base import Tuning
from posttrain_dist.tuning.bottleneck.bottleneck_tuning import Placement
from posttrain_dist.tuning.lora import LoraInit

TUNINGS: dict[str, Tuning] = {
    "full": Full(),
    "part": Full(train=r".*[.]1[.].*"),
    "lora": Lora(rank=4),
    "attention": Lora(rank=4, targets="attention", freeze_a=True),
    "pattern": Lora(rank=4, targets=r".*[.]1[.].*(proj|c_fc)", dora=True),
    "pissa": Lora(rank=4, init=LoraInit.pissa),
    "ia3": Ia3(),
    "prompt": Prompt(tokens=3, ensemble=2),
    "p_tuning": PTuning(tokens=3, layers=2, hidden_size=24),
    "prefix": Prefix(tokens=3),
    "houlsby": Bottleneck(placement=Placement.houlsby),
    "parallel": Bottleneck(placement=Placement.parallel, reduction=4),
}
_SIZES: dict[str, Any] = {"hidden_size": 64, "head_dim": 16, "intermediate_size": 128}
ARCHITECTURES = {
    "Llama": _SIZES,
    "Qwen3": _SIZES | {"tie_word_embeddings": True},
    "GPT2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64},
}
# By default every tuning once, and each architecture in both storages.
SAMPLE = {
    ("Llama", "lora", Quantize.nf4),
    ("Llama", "prefix", Quantize.none),
    ("Llama", "p_tuning", Quantize.none),
    ("Llama", "pissa", Quantize.none),
    ("Qwen3", "pattern", Quantize.nf4),
    ("Qwen3", "prompt", Quantize.nf4),
    ("Qwen3", "houlsby", Quantize.none),
    ("Qwen3", "part", Quantize.none),
    ("GPT2", "ia3", Quantize.nf4),
    ("GPT2", "attention", Quantize.none),
    ("GPT2", "parallel", Quantize.nf4),
}


@pytest.fixture(scope="module")
def folders(builders, tmp_path_factory):
    made = {}

    def of(architecture):
        if architecture not in made:
            folder = tmp_path_factory.mktemp(architecture)
            if architecture == "GPT2":  # whose class has another name
                config = transformers.GPT2Config(**ARCHITECTURES["GPT2"], vocab_size=300)
                transformers.GPT2LMHeadModel(config).save_pretrained(folder)
            else:
                builders.model(folder, architecture, **ARCHITECTURES[architecture])
            made[architecture] = folder
        return made[architecture]

    return of


def job_of(folder, tuning, dtype=Dtype.float32, **model):
    config = RunConfig(name="stored", tuning=tuning, model=ModelConfig(path=str(folder), **model))
    config.train.dtype = dtype
    return make_job(complete(config), find_machine(config, plans_only=False))


def attached(model):
    """(name -> shape, bytes, trained) of parameters; bytes of constants; those of own buffers."""
    parameters, constants = {}, {}
    for name, parameter in model.named_parameters():
        state = getattr(parameter, "quant_state", None)
        shape = tuple(parameter.shape if state is None else state.shape)
        parameters[name] = (shape, parameter.nbytes, parameter.requires_grad)
        if state is not None:
            nested = state.state2
            held = (state.absmax, state.code, state.offset, nested.absmax, nested.code)
            storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in held}
            constants[name + CONSTANTS] = sum(one.nbytes() for one in storages.values())
    own = ("pissa_initial_A", "pissa_initial_B", "token_ids")
    buffers = {n: b.nbytes for n, b in model.named_buffers() if n.endswith(own)}
    return parameters, constants, buffers


def planned(job):
    stored = stored_parameters(job)
    assert len({one.name for one in stored}) == len(stored)
    parameters = {s.name: (s.shape, s.num_bytes, s.trained) for s in stored if s.parameter}
    others = [s for s in stored if not s.parameter]
    constants = {s.name: s.num_bytes for s in others if s.item is Item.quantisation}
    buffers = {s.name: s.num_bytes for s in others if s.item is not Item.quantisation}
    return parameters, constants, buffers


@pytest.mark.parametrize(
    ("architecture", "name", "quantize"),
    [
        pytest.param(
            *case,
            marks=[] if case in SAMPLE else pytest.mark.slow,
            id=f"{case[0]}-{case[1]}-{q.name}",
        )
        for architecture in ARCHITECTURES
        for name in TUNINGS
        for q in Quantize
        for case in [(architecture, name, q)]
        if q is Quantize.none or name not in ("full", "part", "pissa")
    ],
)
@pytest.mark.parametrize(
    "dtype", [Dtype.bfloat16, pytest.param(Dtype.float32, marks=pytest.mark.slow)]
)
def test_every_tensor_is_that_of_the_attached_model(folders, architecture, name, quantize, dtype):
    tuning, nf4 = TUNINGS[name], quantize is Quantize.nf4
    if nf4:
        tuning = replace(tuning, quantize=quantize)
    folder = folders(architecture)
    model = tuned.tuned_model(folder, tuning, getattr(torch, dtype.name), nf4=nf4)
    assert planned(job_of(folder, tuning, dtype)) == attached(model)


@pytest.mark.parametrize(
    "tuning",
    [Lora(rank=4), Lora(rank=4, modules_to_save=["norm", "lm_head"])],
    ids=["rows", "head in full"],
)
def test_rows_of_added_tokens_are_those_of_the_attached_model(folders, tuning):
    folder, tokens = folders("Llama"), {"add_tokens": ["<call>", "</call>"]}
    model = tuned.tuned_model(folder, tuning, torch.bfloat16, **tokens)
    assert planned(job_of(folder, tuning, Dtype.bfloat16, **tokens)) == attached(model)
