"""How a turn ends that closes with several tokens, and marks that also hold the header."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken

from posttrain_dist.data import Form, Supervise, Template
from posttrain_dist.data.chat.checks.check_table import CHECKS
from posttrain_dist.data.chat.encoder import Encoder
from posttrain_dist.errors import DataError
from posttrain_dist.flow import Record

one = runpy.run_path(str(Path(__file__).with_name("supervised_text.py")))["one"]

supervised = runpy.run_path(str(Path(__file__).with_name("supervised_text.py")))["supervised"]

TokenizerOf = Callable[..., Any]
ASK = {"role": "user", "content": "q"}
SYSTEM = {"role": "system", "content": "be kind"}
PROMPT = "{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"
# As Command R7B: the answer closes, and then the turn.
TURN = "{{ '<|start|>' + m.role + '\n' + m.content }}"
TWO = (
    "{% for m in messages %}" + TURN + "{% if m.role == 'assistant' %}{{ '<|close|>' }}{% endif %}"
    "{{ '<|end|>' }}{% endfor %}" + PROMPT
)
NARROW = (
    "{% for m in messages %}{{ '<|start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}{% endgeneration %}{{ '<|close|><|end|>' }}"
    "{% else %}{{ m.content + '<|end|>' }}{% endif %}{% endfor %}" + PROMPT
)
HALF = NARROW.replace(
    "{% endgeneration %}{{ '<|close|><|end|>' }}", "{{ '<|close|>' }}{% endgeneration %}<|end|>"
)
# The last turn is written otherwise than an inner one.
SHIFTING = NARROW.replace("{% generation %}", "{{ 'x' if loop.last }}{% generation %}")
# As Phi-3: what ends the text ends no inner turn.
CLOSED = "{% if not add_generation_prompt %}{{ '<|close|>' }}{% endif %}"
ONE = NARROW.replace("<|close|><|end|>", "<|end|>")
BARE = "{% for m in messages %}" + TURN + "{{ '<|end|>' }}{% endfor %}" + PROMPT


def say(content: str, **rest: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **rest}


def record(*messages: dict[str, Any]) -> Record:
    return Record(channel="c", where="rows.jsonl:7", messages=messages)


def closing(tokenizer_of: TokenizerOf, template: str) -> Any:
    tokenizer = tokenizer_of(template)
    tokenizer.add_tokens([AddedToken("<|close|>", special=True, normalized=False)])
    return tokenizer


def faults(tokenizer: Any, row: Record) -> tuple[str, ...]:
    encoded = one(
        Encoder(tokenizer, Template(form=Form.conversation, strict=False), max_length=9999).encode(
            row
        )
    )
    return encoded.faults


# ------------------------------------------------------------------------------- ends


@pytest.mark.parametrize("template", [TWO, NARROW, TWO.replace("in messages", "in messages[:]")])
@pytest.mark.parametrize("answer", ["hello", "a", ""])
def test_all_tokens_that_close_a_turn(
    tokenizer_of: TokenizerOf, template: str, answer: str
) -> None:
    tokenizer = closing(tokenizer_of, template)
    end = f"{answer}<|close|><|end|>"
    assert supervised(tokenizer, record(ASK, say(answer))) == [end]
    assert supervised(tokenizer, record(ASK, say(answer), ASK)) == [end]
    assert supervised(tokenizer, record(ASK, say(answer), ASK, say("x"))) == [
        end,
        "x<|close|><|end|>",
    ]


@pytest.mark.parametrize("template", [TWO, NARROW])
def test_the_last_message_of_a_policy_ends_alike(tokenizer_of: TokenizerOf, template: str) -> None:
    tokenizer = closing(tokenizer_of, template)
    said = supervised(tokenizer, record(SYSTEM, ASK, say("a"), ASK), supervise=Supervise.all)
    assert said == ["be kind<|end|>", "q<|end|>", "a<|close|><|end|>", "q<|end|>"]
    closed = closing(tokenizer_of, template + CLOSED)
    said = supervised(closed, record(SYSTEM, ASK, say("a"), ASK), supervise=Supervise.all)
    assert said == ["be kind<|end|>", "q<|end|>", "a<|close|><|end|>", "q<|end|>"]


@pytest.mark.parametrize("template", [ONE, BARE])
@pytest.mark.parametrize("answer", ["hello", ""])
def test_the_end_of_the_text_is_not_supervised(
    tokenizer_of: TokenizerOf, template: str, answer: str
) -> None:
    """Behind the last turn or the only one, as behind inner ones."""
    tokenizer = closing(tokenizer_of, template + CLOSED)
    assert supervised(tokenizer, record(ASK, say(answer))) == [f"{answer}<|end|>"]
    assert supervised(tokenizer, record(ASK, say("x"), ASK, say(answer))) == [
        "x<|end|>",
        f"{answer}<|end|>",
    ]
    # Also where the template begins with the system only, so that no probe without one is told.
    asks = "{% if messages[0].role != 'system' %}{{ raise_exception('no') }}{% endif %}"
    tokenizer = closing(tokenizer_of, asks + template + CLOSED)
    assert supervised(tokenizer, record(SYSTEM, ASK, say(answer))) == [f"{answer}<|end|>"]


def test_the_end_of_the_text_may_be_the_only_end(tokenizer_of: TokenizerOf) -> None:
    bare = "{% for m in messages %}{{ m.role + ':' + m.content + '\n' }}{% endfor %}"
    ask = "{% if add_generation_prompt %}{{ 'assistant:' }}{% else %}{{ '<|end|>' }}{% endif %}"
    assert supervised(tokenizer_of(bare + ask), record(ASK, say("a"))) == ["a\n<|end|>"]
    # As gpt-oss: the last turn ends in another token than inner ones.
    other = BARE.replace(
        "'<|end|>'", "'<|close|>' if loop.last and m.role == 'assistant' else '<|end|>'"
    )
    tokenizer = closing(tokenizer_of, other)
    assert supervised(tokenizer, record(ASK, say("a"))) == ["a<|close|>"]


def test_calls_end_before_the_end_of_the_text(tokenizer_of: TokenizerOf) -> None:
    calls = "{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}"
    tokenizer = closing(tokenizer_of, BARE.replace(TURN, TURN + calls) + CLOSED)
    call = {"type": "function", "function": {"name": "fn", "arguments": {"a": 1}}}
    (said,) = supervised(tokenizer, record(ASK, say("", tool_calls=[call])))
    assert said.endswith("}]<|end|>")


def test_an_inner_turn_that_is_written_otherwise_when_it_is_the_last(
    tokenizer_of: TokenizerOf,
) -> None:
    tokenizer = closing(tokenizer_of, SHIFTING)
    row = record(ASK, say("a"), ASK, say("b"))
    assert supervised(tokenizer, row, strict=False) == ["a<|close|><|end|>", "b<|close|><|end|>"]


def test_marks_that_end_before_the_last_token_of_the_turn(tokenizer_of: TokenizerOf) -> None:
    tokenizer = closing(tokenizer_of, HALF)
    row = record(ASK, say("x"), ASK, say("hello"))
    with pytest.raises(DataError, match=r"rows\.jsonl:7: not all .*end messages\[1\]") as caught:
        supervised(tokenizer, row)
    assert caught.value.fix == CHECKS["end_of_turn"].fix
    assert faults(tokenizer, row) == ("end_of_turn",)
    whole = closing(tokenizer_of, HALF.replace("<|end|>{% else", "{% else") + CLOSED)
    assert faults(whole, row) == ()


def test_white_space_before_the_end_token(tokenizer_of: TokenizerOf) -> None:
    """It is the tokenizer's end token that stops a model; another one may open the next turn."""
    spaced = TWO.replace("{{ '<|end|>' }}", "{{ '\n<|end|>' }}")
    assert supervised(closing(tokenizer_of, spaced), record(ASK, say("a"))) == [
        "a<|close|>\n<|end|>"
    ]
    opens = BARE.replace("{{ '<|end|>' }}", "{{ '<|end|>\n<|close|>' }}")
    rows = record(ASK, say("a"), ASK, say("b"))
    assert supervised(closing(tokenizer_of, opens), rows) == ["a<|end|>", "b<|end|>"]


# ------------------------------------------------------------------------------- headers


def loop(answer: str, prompt: str = PROMPT) -> str:
    others = "{{ '<|start|>' + m.role + '\n' + m.content + '<|end|>\n' }}"
    turns = "{% if m.role == 'assistant' %}" + answer + "{% else %}" + others + "{% endif %}"
    return "{% for m in messages %}" + turns + "{% endfor %}" + prompt


HEADER = "{% generation %}{{ '<|start|>assistant\n' + m.content + '<|end|>\n' }}{% endgeneration %}"
NARROW_HEADER = HEADER.replace(
    "+ '<|end|>\n' }}{% endgeneration %}", "}}{% endgeneration %}<|end|>"
)
# As Qwen3.5 without thoughts: the inference prompt holds an empty thought.
NO_THOUGHT = HEADER.replace("assistant\n", "assistant\n<think></think>")
# As TRL's template for gpt-oss: the prompt ends within the header.
CHANNEL = HEADER.replace("assistant\n", "assistant<|close|>final\n")


@pytest.mark.parametrize(
    ("template", "before"),
    [
        (loop(HEADER), ""),
        (loop(NARROW_HEADER), ""),
        (loop(NO_THOUGHT, PROMPT.replace("assistant\n", "assistant\n<think></think>")), ""),
        (loop(CHANNEL, PROMPT.replace("assistant\n", "assistant")), "<|close|>final\n"),
    ],
)
@pytest.mark.parametrize("answer", ["hello", "assistant", ""])
def test_a_mark_around_the_header_too(
    tokenizer_of: TokenizerOf, template: str, before: str, answer: str
) -> None:
    tokenizer = closing(tokenizer_of, template)
    row = record(SYSTEM, ASK, say(answer), ASK, say("x"))
    expected = [f"{before}{answer}<|end|>", f"{before}x<|end|>"]
    assert [said.rstrip() for said in supervised(tokenizer, row)] == expected
    assert "generation_marks" not in faults(tokenizer, row)
    samples, _, _ = Encoder(tokenizer, Template(form=Form.turns), max_length=99).encode(row)
    assert len(samples) == 2


def test_a_header_is_never_supervised(tokenizer_of: TokenizerOf) -> None:
    """Not where marks begin in an earlier message, nor where the prompt is another at inference."""
    both = "{% for m in messages %}{% if loop.index0 % 2 == 1 %}{% generation %}"
    both += (
        "{{ '<|start|>user\n' + messages[0].content + '<|end|>\n<|start|>assistant\n' }}"
        "{{ m.content + '<|end|>' }}{% endgeneration %}{% endif %}{% endfor %}"
    )
    alone = "{% if messages | length == 1 %}{{ '<|start|>user\n' + messages[0].content + '<|end|>"
    both += alone + "\n' }}{% endif %}" + PROMPT
    tokenizer = tokenizer_of(both)
    with pytest.raises(DataError, match=r"rows\.jsonl:7: .*messages\[1\] begins before that turn"):
        supervised(tokenizer, record(ASK, say("hello")))
    assert supervised(tokenizer, record(ASK, say("hello")), strict=False) == ["hello<|end|>"]
    assert faults(tokenizer, record(ASK, say("hello"))) == ("generation_marks",)
    # As Qwen3.5 with thoughts: the prompt opens one that earlier turns do not have.
    thinks = loop(HEADER, PROMPT.replace("assistant\n", "assistant\n<think>"))
    said = supervised(tokenizer_of(thinks), record(ASK, say("hello")), strict=False)
    assert [run.rstrip() for run in said] == ["hello<|end|>"]
    assert "prompt_prefix" in faults(tokenizer_of(thinks), record(ASK, say("hello")))
