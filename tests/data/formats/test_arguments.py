"""Arguments of tool calls: an object, or JSON text where a template is written for that."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from posttrain_dist.data import Template
from posttrain_dist.data.chat.encoder import Encoder
from posttrain_dist.data.chat.rendering.template_choice import load_templates
from posttrain_dist.errors import DataError
from posttrain_dist.flow import Record

TokenizerOf = Callable[..., Any]
ARGUMENTS = {"city": "Paris", "on": True, "é": None}
AS_JSON = '{"city": "Paris", "on": true, "é": null}'
MESSAGES = (
    {"role": "user", "content": "weather?"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": ARGUMENTS}}],
    },
)
ROW = Record(channel="c", where="rows.jsonl:7", messages=MESSAGES)


def source(written: str) -> str:
    return (
        "{% for m in messages %}{{ '<|start|>' + m.role + '\n' + m.content }}"
        "{% for c in m.tool_calls or [] %}" + written + "{% endfor %}{{ '<|end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"
    )


def learned(tokenizer: Any) -> str:
    (encoded,), faults, _ = Encoder(tokenizer, Template(), max_length=999).encode(ROW)
    assert faults == []
    return str(tokenizer.decode(encoded.input_ids_L[encoded.weight_L > 0]))


@pytest.mark.parametrize(
    "written",
    [
        "{{ c.function.name }} {{ c.function.arguments }}",  # printed as it is
        "{{ c.function.name + ' ' + c.function.arguments }}",  # as DeepSeek R1 to V3.1
        "{{ c.function.name }} {{ c.function.arguments | tojson }}",
        "{{ c.function.name }} {{ c.function.arguments if c.function.arguments is string else "
        "c.function.arguments | tojson }}",
    ],
)
def test_arguments_come_out_as_json(tokenizer_of: TokenizerOf, written: str) -> None:
    assert learned(tokenizer_of(source(written))) == f"f {AS_JSON}<|end|>"


def test_arguments_that_are_walked_through_stay_an_object(tokenizer_of: TokenizerOf) -> None:
    walked = (
        "{{ c.function.name }}{% for k, v in c.function.arguments.items() %}"
        "<{{ k }}>{{ v }}</{{ k }}>{% endfor %}"
    )
    said = "f<city>Paris</city><on>True</on><é>None</é><|end|>"
    assert learned(tokenizer_of(source(walked))) == said


def test_arguments_that_come_out_neither_way(tokenizer_of: TokenizerOf) -> None:
    neither = "{{ c.function.name }} {{ c.function.arguments }}{{ c.function.arguments.items() }}"
    tokenizer = tokenizer_of(source(neither))
    with pytest.raises(DataError, match=r"rows\.jsonl:7: .*arguments of tool calls") as caught:
        learned(tokenizer)
    assert "tojson" in caught.value.fix
    plain = Record(channel="c", where="w", messages=({**MESSAGES[0]}, {**MESSAGES[0]}))
    assert "weather?" in load_templates(Template(), tokenizer).plain.render(plain.messages, "w")


def test_text_is_written_as_it_is_and_no_row_is_changed(tokenizer_of: TokenizerOf) -> None:
    template = load_templates(
        Template(), tokenizer_of(source("{{ c.function.name + c.function.arguments }}"))
    ).plain
    text = '{"a":  1}'
    call = {"function": {"name": "f", "arguments": text}}
    assert text in template.render([{**MESSAGES[1], "tool_calls": [call]}], "w")
    template.render(MESSAGES, "w")
    assert MESSAGES[1]["tool_calls"][0]["function"]["arguments"] == ARGUMENTS
