"""Prefixes cut from one rendering, against prefixes that are rendered."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest

from posttrain_dist.data import Template
from posttrain_dist.data.chat.conversation import Conversation
from posttrain_dist.data.chat.rendering.chat_template import ChatTemplate
from posttrain_dist.data.chat.rendering.template_choice import load_templates, template_names
from posttrain_dist.errors import DataError

TokenizerOf = Callable[..., Any]
LOOP = "{% for m in messages %}{{ m.role + ':' + m.content + '<|end|>' }}{% endfor %}"
PROMPT = "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"


def conversation(draw: random.Random) -> list[dict[str, str]]:
    start = [{"role": "system", "content": "be kind"}] if draw.random() < 0.5 else []
    contents = ["", " x ", "hello\n", "assistant", "say: user", "<think>a</think>b"]
    turns = [
        {"role": ("user", "assistant")[i % 2], "content": draw.choice(contents)}
        for i in range(draw.randint(2, 7))
    ]
    return start + turns


def compare(template: ChatTemplate, messages: list[dict[str, str]]) -> None:
    cut = Conversation(template, messages, "w")
    rendered = Conversation(template, messages, "w", cut=False)
    assert cut.text == rendered.text
    for turn in range(1, len(messages)):
        assert cut.prompt(turn) == rendered.prompt(turn)
        try:
            expected = rendered.upto(turn)
        except DataError:  # a refusal of the beginning is one of the whole
            continue
        assert cut.upto(turn) == expected


@pytest.mark.parametrize("family", template_names())
def test_shipped_templates(family: str, family_tokenizer: TokenizerOf) -> None:
    template = load_templates(Template(name=family), family_tokenizer(family)).plain
    # The others look for the last question before they begin, or at the role that follows.
    one_way = {"chatml", "deepseek", "gemma", "llama2", "llama3", "phi", "phi4", "zephyr"}
    assert (template.additions is not None) == (family in one_way)
    draw = random.Random(family)
    for _ in range(50):
        compare(template, conversation(draw))


@pytest.mark.parametrize(
    "source",
    [
        LOOP + PROMPT,
        "{% if messages[0].role == 'system' %}{% set rest = messages[1:] %}"
        "{{ messages[0].content }}{% else %}{% set rest = messages %}{% endif %}"
        + LOOP.replace("messages", "rest")
        + PROMPT,
        "{% set n = namespace(i=0) %}"
        + LOOP.replace("{{ m", "{% set n.i = n.i + 1 %}{{ n.i }}{{ m")
        + PROMPT,
        LOOP.replace(
            "{{ m", "{% for c in m.content %}{{ loop.last }}{% endfor %}{{ loop.index }}{{ m"
        ),
        LOOP + PROMPT + "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}",
    ],
)
def test_causal_templates(source: str, tokenizer_of: TokenizerOf) -> None:
    template = ChatTemplate(tokenizer_of(source))
    assert template.additions is not None
    draw = random.Random(0)
    for _ in range(50):
        compare(template, conversation(draw))


@pytest.mark.parametrize(
    "source",
    [
        LOOP.replace("{{ m", "{{ loop.last }}{{ m"),
        LOOP.replace("{{ m", "{{ loop['length'] }}{{ m"),
        LOOP.replace("{{ m", "{{ loop.nextitem }}{{ m"),
        LOOP.replace("{{ m", "{{ loop | string }}{{ m"),
        LOOP.replace("{{ m", "{{ messages[-1].content }}{{ m"),
        LOOP.replace("{{ m", "{{ messages[1].content }}{{ m"),
        LOOP.replace("{{ m", "{{ messages | length }}{{ m"),
        LOOP.replace("in messages", "in messages[messages | length - 1 :]"),
        LOOP.replace("in messages", "in messages[:1]"),
        LOOP.replace("in messages", "in messages[-2:]"),  # the last ones, whichever these are
        "{% set n = -2 %}" + LOOP.replace("in messages", "in messages[n:]"),
        "{% set rest = messages[-2:] %}" + LOOP.replace("in messages", "in rest"),
        LOOP.replace("in messages", "in messages | reverse"),
        LOOP.replace("in messages", "in messages if m.role == 'user'"),
        LOOP + LOOP,
        "{% set n = namespace() %}{% set n.all = messages %}"
        + LOOP.replace("{{ m", "{{ n.all | length }}{{ m"),
        "{% set rest = messages[1:] %}" + LOOP.replace("{{ m", "{{ rest[0].content }}{{ m"),
        "{% set messages = messages[1:] %}" + LOOP,
        "{% set x = 0 %}" + LOOP + "{% set x = messages %}{{ x | length }}",
        LOOP.replace("{{ m", "{{ add_generation_prompt }}{{ m"),
        "{% set n = namespace(r='') %}"
        + LOOP.replace("{{ m", "{% set n.r = m.role %}{{ m")
        + "{% if n.r == 'user' %}{{ 'assistant:' }}{% endif %}",
        LOOP.replace("{{ m", "{% for c in [loop.last] %}{{ c }}{% endfor %}{{ m"),
        "{% if true %}" + LOOP + "{% endif %}",
        "{{ messages[0].content }}",
    ],
)
def test_templates_that_look_ahead(source: str, tokenizer_of: TokenizerOf) -> None:
    assert ChatTemplate(tokenizer_of(source)).additions is None
