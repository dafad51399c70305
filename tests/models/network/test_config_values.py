"""A value of a config.json that transformers refuses is refused before anything is loaded."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from small_configs import small_config

from posttrain_dist.models.architectures.config_values import ACTIVATIONS, DTYPES
from posttrain_dist.models.architectures.known import TRAINED
from posttrain_dist.models.architectures.refusals import architecture_problems
from posttrain_dist.models.architectures.rope_values import ROPE_NEEDS

# Of every annotation some are wrong; transformers says which.
VALUES = ["x", "", 1, 0, 1.5, True, None, [1], ["x"], {"a": 1}]
# What transformers writes or reads for other ends: no training asks for it.
UNUSED = {"transformers_version", "problem_type", "summary_type", "summary_activation"}


def refused(config: dict[str, Any]) -> bool:
    return bool(architecture_problems(config, Path("config.json")))


def keys() -> Iterator[tuple[str, str]]:
    """(type, key) once for each key and annotation."""
    from transformers import CONFIG_MAPPING

    seen = set()
    for model_type in sorted(TRAINED):
        for field in dataclasses.fields(CONFIG_MAPPING[model_type]):
            known = (field.name, str(field.type))
            if known not in seen and field.name not in UNUSED:
                seen.add(known)
                yield model_type, field.name


def accepts(config: dict[str, Any]) -> bool:
    """Whether transformers makes a config of it."""
    from transformers import AutoConfig

    values = copy.deepcopy(config)
    try:
        AutoConfig.for_model(values.pop("model_type"), **values)
    except Exception:
        return False
    return True


def test_no_key_of_any_architecture_has_a_type_that_transformers_refuses():
    missed = []
    for model_type, name in keys():
        whole = small_config(model_type).to_dict()
        for value in VALUES:
            config = {**whole, name: value}
            if not refused(config) and not accepts(config):
                missed.append((model_type, name, value))
    assert not missed, missed


@pytest.mark.parametrize("model_type", sorted(TRAINED))
def test_what_transformers_writes_is_accepted(model_type):
    assert not architecture_problems(small_config(model_type).to_dict(), Path("config.json"))


def test_names_are_those_of_transformers_and_torch():
    from transformers.activations import ACT2FN
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    assert set(ACT2FN) == ACTIVATIONS
    assert {"default", *ROPE_INIT_FUNCTIONS} == set(ROPE_NEEDS)
    found = {name for name in dir(torch) if isinstance(getattr(torch, name), torch.dtype)}
    assert {name for name in found if getattr(torch, name).is_floating_point} == DTYPES


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LONG = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
BAD = {
    "a string for rope": ({"rope_scaling": "linear"}, "rope_scaling is 'linear', not settings"),
    "a kind of rope": ({"rope_scaling": {"type": "wat"}}, "rope_scaling is of the type 'wat'"),
    "no factor": ({"rope_scaling": {"type": "linear"}}, "of the type linear has no factor"),
    "a factor": ({"rope_scaling": {**LLAMA3, "factor": "8"}}, "rope_scaling.factor is '8'"),
    "no long": ({"rope_scaling": {**LONG, "long_factor": None}}, "longrope has no long_factor"),
    "nothing between": ({"rope_scaling": {**LLAMA3, "low_freq_factor": 4.0}}, "nothing between"),
    "too few": (
        {"rope_scaling": {**LONG, "long_factor": [1.0]}},
        "1 numbers, and a head rotates 4",
    ),
    "theta": ({"rope_theta": "x"}, "rope_theta is 'x', not a number above 0"),
    "nested": (
        {"rope_parameters": {"a": {"rope_theta": -1}}},
        "rope_parameters.a.rope_theta is -1",
    ),
    "activation": ({"hidden_act": "foo"}, "hidden_act is 'foo', which is no activation function"),
    "positions": ({"max_position_embeddings": "8k"}, "max_position_embeddings is '8k', not a pos"),
    "eps": ({"rms_norm_eps": "x"}, "rms_norm_eps is 'x', not a number"),
    "nan": ({"rms_norm_eps": math.nan}, "rms_norm_eps is nan, not a number"),
    "dropout": ({"attention_dropout": 1.5}, "attention_dropout is 1.5, not a number from 0 to 1"),
    "dtype": ({"torch_dtype": "float99"}, "torch_dtype is 'float99', which is no type"),
    "whole dtype": ({"dtype": "int8"}, "dtype is 'int8', which is no type"),
    "padding": ({"pad_token_id": 10**6}, "pad_token_id is 1000000, and vocab_size is"),
    "ends": ({"eos_token_id": ["a"]}, "eos_token_id is ['a'], neither a token id"),
    "a name": ({"architectures": "LlamaForCausalLM"}, "architectures is 'LlamaForCausalLM', not a"),
    "layers": ({"layer_types": ["full_attention", "wat"]}, "layer_types is "),
}


@pytest.mark.parametrize("case", BAD)
def test_each_fault_is_one_message_that_names_the_key(case):
    change, what = BAD[case]
    small = small_config("llama").to_dict()
    drop = {"rope_parameters", "dtype"} - change.keys()
    config = {**{key: value for key, value in small.items() if key not in drop}, **change}
    (error,) = architecture_problems(config, Path("config.json"))
    assert what in error.what and error.where == "config.json" and error.fix


def test_other_names_of_phi_3_are_long_positions():
    config = {**small_config("phi3").to_dict(), "rope_parameters": {**LONG, "rope_type": "su"}}
    size = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    lists = {name: [1.0] * (size // 2) for name in ("short_factor", "long_factor")}
    config["rope_parameters"] |= lists
    assert not refused(config) and refused({**config, "model_type": "llama"})
