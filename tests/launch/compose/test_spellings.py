"""Names of other programs: each leads to a key that there is, or says what to do instead."""

from __future__ import annotations

import dataclasses
import enum
from pathlib import Path

import pytest
from posttrain_launch.compose.spellings import EXPLAINED, KEYS, TEMPLATES, foreign, foreign_template
from posttrain_launch.compose.tuning_spellings import (
    METHODS,
    OPTIMIZERS,
    TUNING_EXPLAINED,
    TUNING_KEYS,
    VALUED,
    foreign_option,
)

from posttrain_dist.config import SLOTS, RunConfig
from posttrain_dist.data.chat.rendering.template_choice import template_names

CONF = Path(__file__).resolve().parents[3] / "conf"


def every_key() -> set[str]:
    found = set()
    for field in dataclasses.fields(RunConfig):
        options = SLOTS.get(field.name, {"": type(getattr(RunConfig(), field.name))}).values()
        for option in options:
            if dataclasses.is_dataclass(option):
                found |= {f"{field.name}.{each.name}" for each in dataclasses.fields(option)}
            else:
                found.add(field.name)
    return found


def test_every_spelling_leads_to_a_key_that_there_is():
    assert set(KEYS.values()) <= every_key()
    tables = [KEYS, EXPLAINED, TUNING_KEYS, TUNING_EXPLAINED]
    assert len(set().union(*tables)) == sum(map(len, tables))  # each in one of them
    assert set(VALUED) <= set(TUNING_EXPLAINED)


def test_every_spelling_of_a_tuning_leads_to_a_key_of_its_option():
    for option, key in TUNING_KEYS.values():
        group, _, name = key.partition(".")
        assert group == "tuning" and name in SLOTS["tuning"][option].__dataclass_fields__, key


def test_every_method_and_optimizer_leads_to_an_option_and_keys_that_there_are():
    options = {path.stem for path in (CONF / "tuning").glob("*.yaml")}
    for advice in METHODS.values():
        words = [word for word in advice.split() if word.startswith("tuning")]
        chosen = words[0].removeprefix("tuning=")
        kind = SLOTS["tuning"][{"qlora": "lora", "dora": "lora"}.get(chosen, chosen)]
        assert chosen in options
        for word in words[1:]:
            name, value = word.removeprefix("tuning.").split("=")
            default = getattr(kind(), name)
            assert not isinstance(default, enum.Enum) or value in type(default).__members__
    assert set(OPTIMIZERS.values()) == {path.stem for path in (CONF / "optimizer").glob("*.yaml")}


def test_every_template_leads_to_an_option_that_there_is():
    options = {path.stem for path in (CONF / "template").glob("*.yaml")}
    assert set(TEMPLATES.values()) <= options == {*template_names(), "tokenizer"}
    assert not set(TEMPLATES) & options


ADVICE = {
    "warmup_steps": "write optimizer.warmup_steps (that is the name here)",
    "preprocessing_num_workers": "write data.workers (that is the name here)",
    "tuner_type": "choose tuning=lora, qlora, ",
    "lora_r": "write tuning=lora tuning.rank=<value> (those are the names here)",
    "r": "write tuning=lora tuning.rank=<value>",
    "lora_target_modules": "write tuning=lora tuning.targets=<value>",
    "additional_target": "write tuning=lora tuning.modules_to_save=",
    "loraplus_lr_ratio": "write tuning=lora tuning.lr_ratio_b=",
    "adapter_name_or_path": "write tuning=lora tuning.init_from=",
    "num_virtual_tokens": "write tuning=prompt tuning.tokens=",
    "load_in_4bit": "choose tuning=qlora, or set tuning.quantize=nf4",
    "load_in_8bit": "8-bit weights are not there; choose tuning=qlora",
    "neftune_noise_alpha": "write train.neftune_alpha (that is the name here)",
    "new_special_tokens": "write model.add_tokens (that is the name here)",
    "freeze_trainable_layers": "choose tuning=full and set tuning.train, a regular expression",
    "hub_model_id": "leave it out: nothing is uploaded",
    "load_best_model_at_end": "leave it out: the checkpoint of the best evaluation is kept",
    "early_stopping_patience": "set diagnose.early_stop=[overfitting] and diagnose.overfit_evals",
    "eval_strategy": "set train.eval_every",
    "train.Learning-Rate": "write optimizer.lr (that is the name here)",
}


@pytest.mark.parametrize("key", ADVICE)
def test_a_spelling_is_known(key):
    assert (foreign(key) or "").startswith(ADVICE[key])


@pytest.mark.parametrize(
    ("name", "option"),
    [
        ("qwen3", "qwen"),
        ("Qwen2.5", "chatml"),
        ("llama3.1", "llama3"),
        ("llama-3.3", "llama3"),
        ("gemma2", "gemma"),
        ("gemma-3", "gemma"),
        ("Qwen3.5", "qwen3.5"),
        ("gpt_oss", "gpt-oss"),
        ("harmony", "gpt-oss"),
        ("deepseek-r1", "r1"),
        ("command-r", "cohere"),
        ("glm-4.5", "glm"),
        ("phi-4", "phi4"),
        ("default", "tokenizer"),
        ("nobody", None),
    ],
)
def test_templates_of_other_programs(name, option):
    assert foreign_template(name) == option


@pytest.mark.parametrize(
    ("key", "value", "advice"),
    [
        ("lora_r", "8", "write tuning=lora tuning.rank=8 (those are the names here)"),
        ("optim", "adamw_torch_fused", "choose optimizer=adamw"),
        ("optim", "adamw_bnb_8bit", "choose optimizer=adamw_8bit"),
        ("optim", "paged_adamw_8bit", "choose optimizer=paged_adamw_8bit"),
        ("optim", "adafactor", "adafactor is not there; choose optimizer=adamw, "),
        ("finetuning_type", "freeze", "choose tuning=full tuning.train=<a regular expression"),
        ("train_type", "lora", "choose tuning=lora"),
        ("adapter", "qlora", "choose tuning=qlora"),
        ("tuner_type", "vera", "vera is not there; choose tuning=lora, "),
        ("peft_type", "PREFIX_TUNING", "choose tuning=prefix"),
        ("quantization_bit", "4", "choose tuning=qlora, or set tuning.quantize=nf4"),
        ("quantization_bit", "8", "8-bit weights are not there"),
        ("pissa_init", "True", "choose tuning=lora tuning.init=pissa"),
        ("init_lora_weights", "pissa_niter_16", "choose tuning=lora tuning.init=pissa"),
    ],
)
def test_a_value_decides_the_advice(key, value, advice):
    assert (foreign(key, value) or "").startswith(advice)


@pytest.mark.parametrize(
    ("group", "name", "advice"),
    [
        ("tuning", "rsLoRA", "tuning=lora tuning.rslora=true"),
        ("tuning", "prompt-tuning", "tuning=prompt"),
        ("optimizer", "PagedAdamW8bit", "optimizer=paged_adamw_8bit"),
        ("tuning", "adamw", None),
        ("engine", "lora", None),
    ],
)
def test_options_of_other_programs(group, name, advice):
    assert foreign_option(group, name) == advice


def test_a_chat_template_is_an_option_or_a_file():
    assert foreign("chat_template", "llama3") == "choose template=llama3"
    assert foreign("chat_template", "llama3.1") == "choose template=llama3"
    assert foreign("chat_template", "my/own.jinja") == "write template.name=my/own.jinja"
    assert (foreign("chat_template", "{{ messages }}") or "").startswith("choose template=chatml, ")
