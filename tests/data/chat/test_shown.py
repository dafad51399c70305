"""What the assistant says is shown: no thought, text or tool call is lost in a template."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from posttrain_dist.data import Form, Template
from posttrain_dist.data.chat.checks.check_table import CHECKS
from posttrain_dist.data.chat.encoder import Encoder, RowExamples
from posttrain_dist.errors import DataError
from posttrain_dist.flow import Record

one = runpy.run_path(str(Path(__file__).with_name("supervised_text.py")))["one"]

TokenizerOf = Callable[..., Any]
ASK = {"role": "user", "content": "weather?"}
RESULT = {"role": "tool", "content": "sun", "tool_call_id": "abcdefghi"}
TOOLS = ({"type": "function", "function": {"name": "get_weather", "parameters": {}}},)
CHATML = (
    "{% if tools %}{{ '<|start|>system\n' + tools | tojson + '<|end|>' }}{% endif %}"
    "{% for m in messages %}{{ '<|start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}SAID{{ '<|end|>' }}{% endgeneration %}"
    "{% else %}{{ m.content + '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"
)
UNMARKED = CHATML.replace("{% generation %}", "").replace("{% endgeneration %}", "")
# As Nemotron and the distilled R1: thoughts are taken out of every turn, the last one too.
STRIPPING = CHATML.replace("{{ m.content }}SAID", "{{ m.content.split('</think>')[-1].lstrip() }}")


def say(content: str, **rest: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **rest}


def call(**arguments: Any) -> dict[str, Any]:
    function = {"name": "get_weather", "arguments": arguments}
    return {"type": "function", "id": "abcdefghi", "function": function}


def template(said: str, source: str = CHATML) -> str:
    return source.replace("SAID", said)


def encode(
    tokenizer: Any, messages: list[dict[str, Any]], tools: Any = (), **choice: Any
) -> RowExamples:
    row = Record(channel="c", where="rows.jsonl:7", messages=tuple(messages), tools=tuple(tools))
    return Encoder(
        tokenizer, Template(**{"form": Form.conversation, **choice}), max_length=9999
    ).encode(row)


def text(tokenizer: Any, encoded: Any) -> str:
    return str(tokenizer.decode(encoded.input_ids_L[encoded.weight_L > 0]))


def hidden(tokenizer: Any, messages: list[dict[str, Any]], match: str, **rest: Any) -> None:
    """Strict refuses with what, where and fix; else the fault is counted."""
    with pytest.raises(DataError, match=rf"rows\.jsonl:7: .*{match}") as caught:
        encode(tokenizer, messages, **rest)
    assert caught.value.fix == CHECKS["content_shown"].fix
    assert "content_shown" in encode(tokenizer, messages, strict=False, **rest).faults


# ------------------------------------------------------------------------------- tool calls


@pytest.mark.parametrize("source", [CHATML, UNMARKED])
@pytest.mark.parametrize("content", ["", "I call get_weather for the city Paris."])
def test_calls_that_are_never_written(tokenizer_of: TokenizerOf, source: str, content: str) -> None:
    """The function's name stands in the description of the tools, and in what is said."""
    messages = [ASK, say(content, tool_calls=[call(city="Paris")]), RESULT, say("sunny")]
    for choice in ({}, {"form": Form.turns}, {"supervise": "last_turn"}):
        with pytest.raises(DataError, match=r"does not show messages\[1\]\.tool_calls") as caught:
            encode(tokenizer_of(template("", source)), messages, TOOLS, **choice)
        assert "template that knows tools" in caught.value.fix
    encoded = one(encode(tokenizer_of(template("", source)), messages, TOOLS, strict=False))
    assert encoded.faults == ("tools_shown", "content_shown")


WRITTEN = {
    "json": "{{ c.function | tojson }}",
    "escaped": "{{ c.function | tojson(ensure_ascii=true) }}",
    "xml": "{{ c.function.name }}{% for k, v in c.function.arguments.items() %}"
    "<{{ k }}>\n{{ v if v is string else v | tojson }}\n</{{ k }}>{% endfor %}",
    "python": "{{ c.function.name }}({% for k, v in c.function.arguments.items() %}"
    "{{ k }}={{ v }}{% endfor %})",
}


@pytest.mark.parametrize("how", sorted(WRITTEN))
def test_calls_as_templates_write_them(tokenizer_of: TokenizerOf, how: str) -> None:
    said = "{% for c in m.tool_calls or [] %}" + WRITTEN[how] + "{% endfor %}"
    arguments = {"city": 'Pa"ris\né', "days": 3, "real": 1.5, "on": True, "of": None}
    deep = {} if how == "python" else {"deep": [{"a": ["x", 1]}, ""]}
    calls = [call(**arguments, **deep), call(city="Rome")]
    _, faults, _ = encode(
        tokenizer_of(template(said)), [ASK, say("Let me see.", tool_calls=calls)], TOOLS
    )
    assert faults == []


@pytest.mark.parametrize("source", [CHATML, UNMARKED])
def test_calls_without_their_arguments(tokenizer_of: TokenizerOf, source: str) -> None:
    said = "{% for c in m.tool_calls or [] %}{{ c.function.name }}{% endfor %}"
    tokenizer = tokenizer_of(template(said, source))
    messages = [ASK, say("Paris, city", tool_calls=[call(city="Paris")])]
    hidden(tokenizer, messages, r"messages\[1\]\.tool_calls", tools=TOOLS)
    first = "{% for c in (m.tool_calls or [])[:1] %}{{ c.function | tojson }}{% endfor %}"
    messages = [ASK, say("", tool_calls=[call(city="Paris"), call(city="Rome")])]
    hidden(tokenizer_of(template(first, source)), messages, "tool_calls", tools=TOOLS)


# ------------------------------------------------------------------------------- words, thoughts


@pytest.mark.parametrize("source", [CHATML, UNMARKED])
@pytest.mark.parametrize("content", ["42", "a long thought is not all"])
def test_thoughts_that_are_never_written(
    tokenizer_of: TokenizerOf, source: str, content: str
) -> None:
    messages = [ASK, say(content, reasoning_content="a long thought")]
    hidden(tokenizer_of(template("", source)), messages, r"messages\[1\]\.reasoning_content")
    for said in ("<t>{{ m.reasoning_content }}</t>", "{{ m.reasoning_content | trim }}"):
        encoded = one(encode(tokenizer_of(template(said, source)), messages))
        assert encoded.faults == ()
    _, faults, _ = encode(
        tokenizer_of(template("", source)), [ASK, say("42", reasoning_content="\n")]
    )
    assert faults == []


@pytest.mark.parametrize("family", ["chatml", "llama3", "mistral", "phi", "zephyr"])
def test_shipped_templates_without_a_place_for_thoughts(
    family: str, family_tokenizer: TokenizerOf
) -> None:
    messages = [ASK, say("42", reasoning_content="long thoughts")]
    hidden(family_tokenizer(family), messages, "reasoning_content", name=family)


@pytest.mark.parametrize("source", [STRIPPING, STRIPPING.replace("generation %}", "if true %}")])
def test_thoughts_that_are_cut_off_even_the_last_turn(
    tokenizer_of: TokenizerOf, source: str
) -> None:
    source = source.replace("{% endif true %}", "{% endif %}")
    tokenizer = tokenizer_of(source)
    messages = [ASK, say("<think>\n2 and 2 is 4\n</think>\n\n4")]
    hidden(tokenizer, messages, r"messages\[1\]\.content")
    # Turn by turn they are what the model says.
    samples, faults, _ = encode(tokenizer, messages * 2, form=Form.turns)
    assert faults == []
    said = [text(tokenizer, sample) for sample in samples]
    assert said == ["<think>\n2 and 2 is 4\n</think>\n\n4<|end|>"] * 2
    assert encode(tokenizer, [ASK, say("  4\n")], strict=False).faults == []


@pytest.mark.parametrize(
    ("content", "is_shown"),
    [
        ("<think>foo</think>bar", True),
        ("<think>\nfoo\n</think>\n\n bar \n", True),
        ("Intro. <think>a</think>y", False),
        ("<think>a</think>x<think>b</think>y", False),
        (" just\n this ", True),
    ],
)
def test_qwen_rewrites_thoughts(
    family_tokenizer: TokenizerOf, content: str, is_shown: bool
) -> None:
    tokenizer = family_tokenizer("qwen")
    if is_shown:
        encoded = one(encode(tokenizer, [ASK, say(content)], name="qwen"))
        thinks = "<think>" in content
        assert encoded.faults == (() if thinks else ("empty_thinking",))
        assert text(tokenizer, encoded).startswith("<think>") == thinks
    else:
        hidden(tokenizer, [ASK, say(content)], r"messages\[1\]\.content", name="qwen")


def test_thoughts_of_earlier_turns_lead_to_one_sample_a_turn(
    family_tokenizer: TokenizerOf,
) -> None:
    tokenizer = family_tokenizer("qwen")
    for first in (say("<think>a</think>x"), say("x", reasoning_content="a")):
        messages = [ASK, first, ASK, say("<think>b</think>y")]
        with pytest.raises(DataError, match=r"(?s)rows\.jsonl:7: .*form=turns"):
            encode(tokenizer, messages, name="qwen")
        samples, faults, _ = encode(tokenizer, messages, name="qwen", form=Form.turns)
        assert (len(samples), faults) == (2, [])
        assert text(tokenizer, samples[0]) == "<think>\na\n</think>\n\nx<|im_end|>"


def test_words_beside_a_call(family_tokenizer: TokenizerOf) -> None:
    messages = [ASK, say(" Let me see.", tool_calls=[call(city="Paris")]), RESULT, say("sunny")]
    tokenizer = family_tokenizer("mistral")
    encoded = one(encode(tokenizer, messages, TOOLS, name="mistral"))
    assert text(tokenizer, encoded) == (
        ' Let me see.[TOOL_CALLS] [{"name": "get_weather", "arguments": {"city": "Paris"}, '
        '"id": "abcdefghi"}]</s> sunny</s>'
    )
    for family in ("chatml", "qwen"):
        tokenizer = family_tokenizer(family)
        samples, faults, _ = encode(tokenizer, messages, TOOLS, name=family, form=Form.turns)
        assert (len(samples), faults) == (2, ["empty_thinking"] if family == "qwen" else [])
        assert "Let me see." in text(family_tokenizer(family), samples[0])
    # The model's own template has no place for them.
    llama = family_tokenizer("llama3")
    hidden(llama, messages, r"messages\[1\]\.content", tools=TOOLS, name="llama3")


@pytest.mark.parametrize("source", [CHATML, UNMARKED])
@pytest.mark.parametrize("content", ["get_weather", "Paris", '{"city": "Paris"}', "t"])
def test_words_beside_a_call_that_are_as_the_call(
    tokenizer_of: TokenizerOf, source: str, content: str
) -> None:
    """The call is written and the content is not: that is what is said."""
    said = "{% if m.tool_calls %}{{ m.tool_calls[0].function | tojson }}{% endif %}"
    only = source.replace("{{ m.content }}SAID", said + "{{ '' if m.tool_calls else m.content }}")
    messages = [ASK, say(content, tool_calls=[call(city="Paris")]), RESULT, say("sunny")]
    for choice in ({}, {"form": Form.turns}):
        with pytest.raises(DataError, match=r"does not write all of messages\[1\]\.content"):
            encode(tokenizer_of(only), messages, TOOLS, **choice)
    both = source.replace("{{ m.content }}SAID", "{{ m.content }}" + said)
    assert encode(tokenizer_of(both), messages, TOOLS).faults == []


def test_spaces_are_the_templates_own_affair(tokenizer_of: TokenizerOf) -> None:
    trims = CHATML.replace("{{ m.content }}SAID", "{{ m.content | trim }}")
    encoded = one(encode(tokenizer_of(trims), [ASK, say(" \n two  words\n")]))
    assert encoded.faults == ()


# ------------------------------------------------------------------------------- empty turns


def test_an_empty_turn_is_counted(family_tokenizer: TokenizerOf) -> None:
    tokenizer = family_tokenizer("zephyr")
    for content in ("", " "):
        encoded = one(encode(tokenizer, [ASK, say(content)], name="zephyr"))
        assert encoded.faults == ("empty_turn",)
    assert CHECKS["empty_turn"].level == "warning"
    chatml = family_tokenizer("chatml")
    calls = [ASK, say("", tool_calls=[call(city="Paris")])]
    assert encode(chatml, calls, TOOLS, name="chatml").faults == []
    qwen = family_tokenizer("qwen")
    thought = [ASK, say("", reasoning_content="hm")]
    assert encode(qwen, thought, name="qwen").faults == []


def test_fix_of_a_completion_that_merges_with_its_prompt(tokenizer_of: TokenizerOf) -> None:
    row = Record(channel="c", where="t:1", text="x the", supervised_from=3)
    with pytest.raises(DataError, match="merge with the prompt's last") as caught:
        Encoder(tokenizer_of(None), Template(form=Form.conversation), max_length=99).encode(row)
    assert "form=turns" not in caught.value.fix
    assert "template" not in caught.value.fix
    assert "end of the prompt" in caught.value.fix
