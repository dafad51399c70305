"""Our Jinja environment beside that of transformers: the same text, marks and refusals."""

from __future__ import annotations

import datetime as datetime_module
import re
from typing import Any

import jinja2
import pytest

from posttrain_dist.data.chat.rendering.jinja_environment import (
    OutputBuffer,
    compile_template,
    with_thoughts,
)
from posttrain_dist.data.chat.rendering.template_choice import FOLDER, template_names

VARIABLES = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
CALL = {
    "type": "function",
    "id": "a23456789",
    "function": {"name": "f", "arguments": {"ä": [1.0, None, True, "<&'\">"]}},
}
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
USER = {"role": "user", "content": " Ünï <|im_end|> &lt; 'q' "}
CONVERSATIONS: list[list[dict[str, Any]]] = [
    [USER],
    [{"role": "system", "content": "be\nkind"}, USER, {"role": "assistant", "content": "a\n"}],
    [USER, {"role": "assistant", "content": "one"}, USER, {"role": "assistant", "content": "two"}],
    [USER, {"role": "assistant", "content": "x", "reasoning_content": "why"}, USER],
    [USER, {"role": "assistant", "content": "x", "thinking": "why"}],
    [USER, {"role": "assistant", "content": "x", "reasoning": "why", "thinking": None}],
    [
        USER,
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "12", "name": "f", "tool_call_id": "a23456789"},
        {"role": "assistant", "content": "done"},
    ],
    [{"role": "assistant", "content": "first"}],
    [{"role": "nobody", "content": "who"}],
    [],
]
ODD = {
    "loop controls": "{% for m in messages %}{% if loop.index0 > 1 %}{% break %}{% endif %}"
    "{% if m.role == 'system' %}{% continue %}{% endif %}{{ m.content }}{% endfor %}",
    "tojson": "{{ tools | tojson }}{{ messages | tojson(indent=2, sort_keys=true) }}"
    "{{ messages | tojson(ensure_ascii=true, separators=(',', ':')) }}{{ '<&' | tojson }}",
    "namespace": "{% set ns = namespace(n=0, self='s') %}{% for m in messages %}"
    "{% set ns.n = ns.n + m.content | length %}{% endfor %}{{ ns.n }}{{ ns.self }}",
    "namespace of a dict": "{% set ns = namespace({'a': 1}, b=2) %}{{ ns.a + ns.b }}",
    "private name": "{% set ns = namespace(_a=1) %}{{ ns._a }}",
    "private name set later": "{% set ns = namespace(a=1) %}{% set ns.__b = 2 %}",
    "dict": "{{ dict(a=1, b=[2]) | tojson }}{{ dict.fromkeys(['x', 'y'], 3) | tojson }}",
    "dict's type": "{{ dict.__class__ }}{{ dict.mro() }}",
    "raise": "{{ raise_exception('not <these> roles') }}",
    "date": "{{ strftime_now('%d %B %Y, %H') }}",
    "sandbox": "{{ messages.append(1) }}",
    "sandbox of a string": "{{ ''.__class__.__mro__ }}",
    "sandbox of format": "{{ '{0.__class__}'.format(messages) }}",
    "undefined": "[{{ documents }}{{ nothing }}{{ nothing is defined }}]",
    "undefined attribute": "{{ nothing.more }}",
    "blocks trimmed": "  {% if true %}\n  a\n  {%- endif %}\n\n{%+ if true %} b {% endif %}\n",
    "marks": "{% for m in messages %}{{ m.role }}:{% generation %}{{ m.content }}</s>"
    "{% endgeneration %}\n{% endfor %}",
    "marks with dashes": "{% for m in messages %} {%- generation -%} {{ m.content }} "
    "{%- endgeneration -%} {% endfor %}",
    "marks in a macro": "{% macro say(m) %}<{% generation %}{{ m.content }}{% endgeneration %}>"
    "{% endmacro %}{% for m in messages %}{{ m.role }}{{ say(m) }}{% endfor %}",
    "marks in each other": "a{% generation %}b{% generation %}c{% endgeneration %}d"
    "{% endgeneration %}e",
    "marks in a set block": "a{% set x %}b{% generation %}c{% endgeneration %}{% endset %}{{ x }}",
    "mark without an end": "{% generation %}a",
    "autoescape": "{% autoescape true %}{% generation %}{{ '<' }}{% endgeneration %}"
    "{% endautoescape %}",
    "not a template": "{% if %}",
    "unknown tag": "{% trans %}a{% endtrans %}",
    "arithmetic": "{{ 1 // 0 }}",
    "filters": "{{ messages | map(attribute='role') | join(',') | upper | trim | e }}",
    "tests": "{{ messages is iterable }}{{ messages is mapping }}{{ 'x' in 'xy' }}",
    "slices": "{{ messages[::-1] | length }}{{ messages[-1].role }}{{ (messages | last).content }}",
}


@pytest.fixture(autouse=True)
def fixed_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ask in the same second."""

    class Fixed(datetime_module.datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return cls(2031, 5, 4, 3, 2, 1)

    from transformers.utils import chat_template_utils

    monkeypatch.setattr(chat_template_utils, "datetime", Fixed)
    monkeypatch.setattr("posttrain_dist.data.chat.rendering.jinja_environment.datetime", Fixed)


def ours(source: str, messages: list[Any], tools: Any, prompt: bool) -> tuple[str, list[Any]]:
    compiled: Any = compile_template(source)
    output, marks = OutputBuffer(), list[tuple[int, int]]()
    with compiled.environment.record_marks(output, marks):
        for piece in compiled.generate(
            messages=with_thoughts(messages),
            tools=tools,
            documents=None,
            add_generation_prompt=prompt,
            **VARIABLES,
        ):
            output.append(piece)
    return "".join(output), marks


def theirs(source: str, messages: list[Any], tools: Any, prompt: bool) -> tuple[str, list[Any]]:
    from transformers.utils.chat_template_utils import render_jinja_template

    texts, marks = render_jinja_template(
        conversations=[messages],
        tools=tools,
        chat_template=source,
        return_assistant_tokens_mask=True,
        add_generation_prompt=prompt,
        **VARIABLES,
    )
    return texts[0], marks[0]


def outcome(render: Any, *arguments: Any) -> tuple[str, Any]:
    """What a rendering gives, or the type and the words with which it refuses."""
    try:
        return "text", render(*arguments)
    except Exception as error:
        words = "" if isinstance(error, jinja2.exceptions.SecurityError) else str(error)
        return type(error).__name__, re.sub(r"'\w+(\.\w+)+ object'", "an object", words)


@pytest.mark.parametrize("name", [*template_names(), *ODD])
def test_writes_marks_and_refuses_as_transformers_does(name: str) -> None:
    source = ODD.get(name) or (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")
    kinds = set()
    for messages in CONVERSATIONS:
        for tools in (None, TOOLS):
            for prompt in (False, True):
                wanted = outcome(theirs, source, messages, tools, prompt)
                assert outcome(ours, source, messages, tools, prompt) == wanted
                kinds.add(wanted[0])
    assert name in ODD or "text" in kinds


def test_the_odd_templates_reach_what_they_are_about() -> None:
    conversation = CONVERSATIONS[2]
    for name, kind in {
        "private name": "SecurityError",
        "private name set later": "SecurityError",
        "sandbox": "SecurityError",
        "raise": "TemplateError",
        "not a template": "TemplateSyntaxError",
        "unknown tag": "TemplateSyntaxError",
        "mark without an end": "TemplateSyntaxError",
        "undefined attribute": "UndefinedError",
    }.items():
        assert outcome(ours, ODD[name], conversation, TOOLS, False)[0] == kind
    text, marks = ours(ODD["marks"], conversation, None, False)
    assert [text[start:end] for start, end in marks] == [
        f"{message['content']}</s>" for message in conversation
    ]
    assert ours(ODD["date"], [], None, False)[0] == "04 May 2031, 03"
