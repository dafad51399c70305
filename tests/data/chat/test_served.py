"""Templates as they are served: transformers renders them without being told a run's variables."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from posttrain_dist.data.chat.rendering.served import Prompt, Served, ServedRow
from posttrain_dist.data.chat.rendering.served_template import served_templates, with_defaults
from posttrain_dist.errors import ConfigError, DataError, ModelError

TokenizerOf = Callable[..., Any]
MESSAGES = [{"role": "user", "content": "a question"}]
BODY = (
    "{% for m in messages %}<|start|>{{ m.content }}<|end|>{% endfor %}"
    "{% if value is defined %}{{ value | tojson }}{% else %}unset{% endif %}"
)
VALUES = [
    True,
    None,
    -3,
    1e-07,
    "",
    'it\'s "quoted" {% raw %} {{ x }} %} {# \\ \n\t é \U0001f600 \u2028 end',
    {"a": [1, {"b": [], "c": {}}, "two"], "with space": False},
    [[-1.5], {}],
]


def rendered(tokenizer: Any, source: str, **variables: Any) -> str:
    text: str = tokenizer.apply_chat_template(
        MESSAGES, chat_template=source, tokenize=False, add_generation_prompt=True, **variables
    )
    return text


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_a_default_of_any_kind_is_what_was_given(tokenizer_of: TokenizerOf, value: Any) -> None:
    tokenizer = tokenizer_of(BODY)
    served = with_defaults(BODY, {"value": value})
    assert rendered(tokenizer, BODY).endswith("unset")
    told = rendered(tokenizer, BODY, value=value)
    assert told.endswith(json.dumps(value, ensure_ascii=False))
    assert rendered(tokenizer, served) == told
    for other in ("other", None, False):  # what a request gives goes before
        assert rendered(tokenizer, served, value=other) == rendered(tokenizer, BODY, value=other)


@pytest.mark.parametrize(
    "start", ["", "\n", "\n\n  ", "  ", "{#- note -#}\n", "\t{%- set y = 1 %}\n"]
)
@pytest.mark.parametrize("end", ["", "\n", "\n\n"])
def test_the_text_around_stays_as_it_was(tokenizer_of: TokenizerOf, start: str, end: str) -> None:
    source = f"{start}{{% if value %}}x{{% endif %}}\n{{{{ other }}}}{BODY}{end}"
    served = with_defaults(source, {"value": 2, "other": "o", "unread": 1})
    assert served.endswith(source) and "unread" not in served
    tokenizer = tokenizer_of(source)
    assert rendered(tokenizer, served) == rendered(tokenizer, source, value=2, other="o")
    # An export is trained on again: the newer run's value is the one that counts.
    again = with_defaults(served, {"value": 3})
    assert rendered(tokenizer, again) == rendered(tokenizer, source, value=3, other="o")


def test_without_variables_a_template_is_left_alone() -> None:
    assert with_defaults("{% broken", {}) == "{% broken"
    assert with_defaults("{% broken", {"a": 1}) == "{% broken"  # rendering it says so
    assert served_templates({"default": BODY, "rag": "r"}, {}) == {"default": BODY, "rag": "r"}


def test_what_a_tokenizer_always_gives_is_replaced(tokenizer_of: TokenizerOf) -> None:
    source = "{{ bos_token }}" + BODY
    tokenizer = tokenizer_of(source)
    served = with_defaults(source, {"bos_token": "<|start|>"}, fixed=tokenizer.special_tokens_map)
    expected = rendered(tokenizer, source, bos_token="<|start|>")
    assert rendered(tokenizer, served) == expected
    assert expected != rendered(tokenizer, source)


def test_the_date_of_a_run_is_served(tokenizer_of: TokenizerOf) -> None:
    source = (
        "{% set fmt = '%B %Y' %}{% if strftime_now is defined %}"
        '{{ strftime_now("%d %b %Y") }}|{{ strftime_now(fmt) }}{% endif %}'
    )
    tokenizer = tokenizer_of(source)
    served = with_defaults(source, {"strftime_now": "2024-07-26"})
    assert rendered(tokenizer, served) == "26 Jul 2024|July 2024"
    other = with_defaults("{{ strftime_now(form) }}", {"strftime_now": "2024-07-26"})
    with pytest.raises(Exception, match="no date in the format %A"):
        rendered(tokenizer, other, form="%A")
    with pytest.raises(ConfigError, match="no date") as caught:
        with_defaults(source, {"strftime_now": "26 Jul 2024"})
    assert caught.value.where == "template.variables.strftime_now"


def test_the_chosen_variant_is_served_with_tools_and_without(tokenizer_of: TokenizerOf) -> None:
    sources = {"default": "d", "tool_use": "t{{ x }}", "rag": "r"}
    chosen = served_templates(sources, {"x": 1}, variant="tool_use")
    tokenizer = tokenizer_of(chosen)
    for tools in (None, [{"name": "f"}]):
        assert tokenizer.apply_chat_template(MESSAGES, tools=tools, tokenize=False) == "t1"
    assert chosen["rag"] == "r"
    for name in ("../x", "a/b", ""):
        with pytest.raises(ModelError, match="which no file can be called"):
            served_templates({"default": "d", name: "e"}, {})


def test_served_json_is_read_as_it_was_written(tmp_path: Path) -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    prompt = Prompt([{"role": "user", "content": "é\u2028"}], tools, {"think": None})
    served = Served({"default": "a", "rag": "b"}, [ServedRow(prompt, [3, 1])])
    served.write(tmp_path)
    assert Served.read(tmp_path) == served
    assert Served.read(tmp_path / "nowhere") is None
    for text in ("", "[]", '{"templates": {}}', '{"templates": [], "rows": []}'):
        (tmp_path / "served.json").write_text(text)
        with pytest.raises(DataError, match="cannot be read") as caught:
            Served.read(tmp_path)
        assert caught.value.where == str(tmp_path / "served.json")
    (tmp_path / "served.json").write_text("null")
    assert Served.read(tmp_path) is None
