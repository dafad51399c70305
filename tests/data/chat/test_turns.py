"""Where a turn begins and ends: proved by prefixes, or by marks that are not trusted blindly."""

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
CALLS = [{"type": "function", "function": {"name": "fn", "arguments": {"city": "Paris"}}}]
# As gpt-oss: its prompt ends within the header, thoughts have a channel of their own.
CHANNELS = (
    "{% for m in messages %}{% if m.role == 'assistant' %}"
    "{% if m.thinking %}{{ '<|start|>assistant<|channel|>analysis<|message|>' }}"
    "{{ m.thinking + '<|end|>' }}{% endif %}"
    "{{ '<|start|>assistant<|channel|>final<|message|>' + m.content + '<|return|>' }}"
    "{% else %}{{ '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"
)
# As Qwen3, without marks: a turn is rendered differently once another follows.
SHIFTING = (
    "{% for m in messages %}{{ '<|start|>' + m.role + '\n' }}"
    "{% if loop.last and m.role == 'assistant' %}{{ '<think></think>' }}{% endif %}"
    "{{ m.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"
)
OTHERS = "{{ '<|start|>' + m.role + '\n' + m.content + '<|end|>' }}"
PROMPT = "{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"


def say(content: str, **rest: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **rest}


def loop(answer: str) -> str:
    """A template whose assistant's turns are `answer`."""
    return (
        "{% for m in messages %}{% if m.role == 'assistant' %}" + answer + "{% else %}" + OTHERS
    ) + ("{% endif %}{% endfor %}" + PROMPT)


def record(*messages: dict[str, Any], weights: tuple[float | None, ...] = ()) -> Record:
    return Record(channel="c", where="rows.jsonl:7", messages=messages, weights=weights)


def faults(tokenizer: Any, row: Record, **choice: Any) -> tuple[str, ...]:
    encoder = Encoder(
        tokenizer,
        Template(**{"form": Form.conversation, "strict": False, **choice}),
        max_length=9999,
    )
    encoded = one(encoder.encode(row))
    return encoded.faults


def channels(tokenizer_of: TokenizerOf, template: str = CHANNELS) -> Any:
    tokenizer = tokenizer_of(template)
    names = ["<|channel|>", "<|message|>", "<|return|>"]
    tokenizer.add_tokens([AddedToken(n, special=True, normalized=False) for n in names])
    return tokenizer


# ------------------------------------------------------------------------------- prefixes


@pytest.mark.parametrize("answer", ["The cat", "a", "e", "final", "", " n", "<|return|>", "|"])
@pytest.mark.parametrize("thought", ["", "s", "final", "analysis", "long <|end|> thoughts"])
def test_an_answer_that_stands_in_its_own_header(
    tokenizer_of: TokenizerOf, answer: str, thought: str
) -> None:
    tokenizer = channels(tokenizer_of)
    rest = {"reasoning_content": thought} if thought else {}
    header = "<|channel|>final<|message|>"
    before = f"<|channel|>analysis<|message|>{thought}<|end|><|start|>assistant" if thought else ""
    expected = f"{before}{header}{answer}<|return|>"
    assert supervised(tokenizer, record(ASK, say(answer, **rest))) == [expected]
    two = record(ASK, say(answer, **rest), ASK, say("x"))
    assert supervised(tokenizer, two) == [expected, f"{header}x<|return|>"]


def test_end_of_the_text_is_not_the_end_of_the_turn(tokenizer_of: TokenizerOf) -> None:
    """Old templates write the end-of-text token behind the whole conversation."""
    template = loop("{{ '<|start|>assistant\n' + m.content + '<|end|>' }}")
    template += "{% if not add_generation_prompt %}{{ '<|return|>' }}{% endif %}"
    tokenizer = channels(tokenizer_of, template)
    row = record(ASK, say("a"), ASK, say(""))
    assert supervised(tokenizer, row) == ["a<|end|>", "<|end|>"]


def test_a_turn_whose_place_cannot_be_proved_refuses_the_row_alone(
    tokenizer_of: TokenizerOf,
) -> None:
    shifted = CHANNELS.replace("+ m.content +", "+ (m.content | length | string) + m.content +")
    tokenizer = channels(tokenizer_of, shifted)
    with pytest.raises(DataError, match=r"rows\.jsonl:7: .*messages\[1\].*cannot be proved"):
        supervised(tokenizer, record(ASK, say("e")), strict=False)


@pytest.mark.parametrize("strict", [True, False])
def test_one_row_that_cannot_be_proved_does_not_end_the_others(
    tokenizer_of: TokenizerOf, strict: bool
) -> None:
    encoder = Encoder(
        tokenizer_of(SHIFTING), Template(form=Form.conversation, strict=strict), max_length=999
    )
    good, bad = record(ASK, say("4")), record(ASK, say("4"), ASK, say("4"))
    first, refused, last = encoder.encode_many([good, bad, good])
    assert not isinstance(first, DataError) and not isinstance(last, DataError)
    assert len(first.examples) == len(last.examples) == 1
    assert isinstance(refused, DataError)
    assert refused.where == "rows.jsonl:7" and "form=turns" in refused.fix


def test_content_of_another_role_that_cannot_be_proved(tokenizer_of: TokenizerOf) -> None:
    twice = "{% for m in messages %}" + OTHERS.replace("m.content", "m.content + m.content")
    encoder = Encoder(
        tokenizer_of(twice + "{% endfor %}" + PROMPT),
        Template(form=Form.conversation, supervise=Supervise.all, strict=False),
        max_length=999,
    )
    (refused,) = encoder.encode_many([record(ASK, say("4"))])
    assert isinstance(refused, DataError) and refused.where == "rows.jsonl:7"


# ------------------------------------------------------------------------------- marks


MARKED = (
    "{{ '<|start|>assistant\n' }}{% generation %}{{ m.content + '<|end|>' }}{% endgeneration %}"
)
HEADER = "{% generation %}{{ '<|start|>assistant\n' + m.content + '<|end|>' }}{% endgeneration %}"


def test_a_mark_that_begins_before_the_turn(tokenizer_of: TokenizerOf) -> None:
    row = record(ASK, say("yo"), ASK, say("yo"))
    assert supervised(tokenizer_of(loop(MARKED)), row) == ["yo<|end|>"] * 2
    # The header is what the generation prompt adds.
    assert supervised(tokenizer_of(loop(HEADER)), row) == ["yo<|end|>"] * 2
    assert faults(tokenizer_of(loop(HEADER)), row) == ()


def test_a_mark_in_a_macro_is_misplaced(tokenizer_of: TokenizerOf) -> None:
    macro = "{% macro turn(m) %}" + MARKED + "{% endmacro %}"
    tokenizer = tokenizer_of(macro + loop("{{ turn(m) }}"))
    row = record(ASK, say("a long answer that ends"))
    with pytest.raises(DataError, match=r"rows\.jsonl:7: .*messages\[1\] begins before") as caught:
        supervised(tokenizer, row)
    assert caught.value.fix == CHECKS["generation_marks"].fix
    assert "generation_marks" in faults(tokenizer, row)


def test_one_mark_around_everything(tokenizer_of: TokenizerOf) -> None:
    everything = "{% generation %}{% for m in messages %}" + OTHERS
    tokenizer = tokenizer_of(everything + "{% endfor %}{% endgeneration %}" + PROMPT)
    secret = {"role": "user", "content": "secret"}
    with pytest.raises(DataError, match=r"rows\.jsonl:7: .*begins before"):
        supervised(tokenizer, record(secret, say("hi")))
    with pytest.raises(DataError, match=r"rows\.jsonl:7: .*which is whose cannot be proved"):
        supervised(tokenizer, record(secret, say("hi"), secret, say("hi")))


def test_a_learned_turn_without_a_mark(tokenizer_of: TokenizerOf) -> None:
    calls = "{{ '<|start|>assistant\nCALL ' + m.tool_calls[0].function | tojson + '<|end|>' }}"
    answer = "{% if m.tool_calls %}" + calls + "{% else %}" + MARKED + "{% endif %}"
    tokenizer = tokenizer_of(loop(answer))
    row = (ASK, say("", tool_calls=CALLS), {"role": "tool", "content": "sun"}, say("sunny"))
    with pytest.raises(DataError, match=r"rows\.jsonl:7: .*marks nothing of messages\[1\]"):
        supervised(tokenizer, record(*row))
    assert faults(tokenizer, record(*row)) == ("generation_marks",)
    only_last = record(*row, weights=(None, 0.0, None, None))
    assert supervised(tokenizer, only_last) == ["sunny<|end|>"]
    assert supervised(tokenizer, record(*row), supervise=Supervise.last_turn) == ["sunny<|end|>"]


def test_a_turn_does_not_own_the_mark_of_a_later_one(tokenizer_of: TokenizerOf) -> None:
    """A header inside a mark: what it marks begins before its own prompt ends."""
    late = HEADER.replace("{{ '<|start|>", "{{ '<|start|>").replace("m.content", "'CALL fn Paris'")
    answer = "{% if m.tool_calls %}" + late + MARKED[:0] + "{% else %}" + MARKED
    answer = answer.replace("{% endgeneration %}", "{% endgeneration %}", 1) + "{% endif %}"
    split = answer.replace("CALL fn", "CALL' }}{% endgeneration %}{% generation %}{{ ' fn", 1)
    row = record(ASK, say("first"), ASK, say("", tool_calls=CALLS), weights=(None, 1.0, None, 0.0))
    with pytest.raises(DataError, match=r"rows\.jsonl:7: .*which is whose cannot be proved"):
        supervised(tokenizer_of(loop(split)), row)


@pytest.mark.parametrize("answer", ["", "a", "<think>", "x</think>"])
def test_an_answer_ends_where_its_turn_ends(tokenizer_of: TokenizerOf, answer: str) -> None:
    """Marks around header and content, the end token behind them; thoughts are no ends."""
    template = CHANNELS.replace(
        "{{ '<|start|>assistant<|channel|>final<|message|>' + m.content + '<|return|>' }}",
        "{{ '<|start|>assistant' }}{% generation %}{{ '<|channel|>final<|message|>' + m.content }}"
        "{% endgeneration %}{{ '<|return|>' }}",
    )
    tokenizer = channels(tokenizer_of, template)
    names = ["<think>", "</think>"]
    tokenizer.add_tokens([AddedToken(n, special=True, normalized=False) for n in names])
    expected = f"<|channel|>final<|message|>{answer}<|return|>"
    assert supervised(tokenizer, record(ASK, say(answer))) == [expected]
    unmarked = channels(tokenizer_of)
    unmarked.add_tokens([AddedToken(n, special=True, normalized=False) for n in names])
    assert supervised(unmarked, record(ASK, say(answer))) == [expected]


# ------------------------------------------------------------------------------- own tokens


def test_thoughts_are_tokens_where_the_tokenizer_calls_them_special(
    tokenizer_of: TokenizerOf,
) -> None:
    tokenizer = tokenizer_of(loop(MARKED))
    tokenizer.add_tokens(
        [AddedToken(n, special=True, normalized=False) for n in ("<think>", "</think>")]
    )
    row = record({"role": "user", "content": "<think>"}, say("<think>h</think>4 <|end|>"))
    encoded = one(Encoder(tokenizer, Template(form=Form.conversation), max_length=99).encode(row))
    names = [tokenizer.convert_ids_to_tokens(int(i)) for i in encoded.input_ids_L]
    said = names[names.index("assistant") + 2 :]
    assert said[:4] == ["<think>", "h", "</think>", "4"]
    assert names.count("<think>") == 1 and names.count("<|end|>") == 2  # not those in content
    assert encoded.faults == ("control_tokens",)
    clean = record(ASK, say("<think>h</think>4"))
    assert faults(tokenizer, clean) == ()
