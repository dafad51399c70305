"""Names of other programs: each leads to a key that there is, or says what to do instead."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from posttrain_launch.compose.spellings import EXPLAINED, KEYS, TEMPLATES, foreign, foreign_template

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
    assert not set(KEYS) & set(EXPLAINED)


def test_every_template_leads_to_an_option_that_there_is():
    options = {path.stem for path in (CONF / "template").glob("*.yaml")}
    assert set(TEMPLATES.values()) <= options == {*template_names(), "tokenizer"}
    assert not set(TEMPLATES) & options


ADVICE = {
    "warmup_steps": "write optimizer.warmup_steps (that is the name here)",
    "preprocessing_num_workers": "write data.workers (that is the name here)",
    "tuner_type": "leave it out: this version trains every parameter",
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


def test_a_chat_template_is_an_option_or_a_file():
    assert foreign("chat_template", "llama3") == "choose template=llama3"
    assert foreign("chat_template", "llama3.1") == "choose template=llama3"
    assert foreign("chat_template", "my/own.jinja") == "write template.name=my/own.jinja"
    assert (foreign("chat_template", "{{ messages }}") or "").startswith("choose template=chatml, ")
