"""Turns as samples of their own: as they are asked for, as they are said, and how they end."""

from __future__ import annotations

import json
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from posttrain_dist.data import Form, LongRows, Template, Thinking
from posttrain_dist.data.chat.encoder import Encoder
from posttrain_dist.data.chat.rendering.template_choice import load_templates
from posttrain_dist.errors import ConfigError, DataError
from posttrain_dist.flow import Record

TokenizerOf = Callable[..., Any]
_samples = runpy.run_path(str(Path(__file__).with_name("turn_samples.py")))
START = _samples["START"]
END = _samples["END"]
ASKED = _samples["ASKED"]
CHATML = _samples["CHATML"]
HYBRID = _samples["HYBRID"]
CUTS = _samples["CUTS"]
ASK = _samples["ASK"]
MORE = _samples["MORE"]
say = _samples["say"]
encode = _samples["encode"]
parts = _samples["parts"]
prompts = _samples["prompts"]


# ------------------------------------------------------------------------------- thoughts


def test_prompts_that_open_thoughts(tokenizer_of: TokenizerOf) -> None:
    tokenizer = tokenizer_of(CUTS)
    first, last = say("<think>\nwhy\n</think>\n\nHello"), say("Bye", "so")
    row = encode(tokenizer, ASK, first, MORE, last)
    asked = prompts(tokenizer, [ASK], [ASK, first, MORE])
    assert asked[1].endswith("Hello<|end|><|start|>user\nMore<|end|><|start|>assistant\n<think>\n")
    assert parts(tokenizer, row) == [
        (asked[0], "why\n</think>\n\nHello<|end|>"),
        (asked[1], "so\n</think>\n\nBye<|end|>"),
    ]
    assert (row.by_turns, row.faults) == (True, [])
    for example, text in zip(row.examples, asked, strict=True):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert example.input_ids_L[: len(ids)].tolist() == ids
        assert not example.weight_L[: len(ids)].any() and example.weight_L[len(ids) :].all()
    with pytest.raises(DataError, match=r"rows\.jsonl:7: .*does not begin"):
        encode(tokenizer, ASK, first, form=Form.conversation)


def test_an_open_block_is_closed_empty_by_choice_alone(tokenizer_of: TokenizerOf) -> None:
    tokenizer = tokenizer_of(CUTS)
    for form in (Form.auto, Form.turns):
        with pytest.raises(DataError, match=r"rows\.jsonl:7: .*opens its thoughts") as caught:
            encode(tokenizer, ASK, say("Hello"), form=form)
        assert "template.thinking=close" in caught.value.fix
    row = encode(tokenizer, ASK, say("Hello"), thinking=Thinking.close)
    assert parts(tokenizer, row) == [(prompts(tokenizer, [ASK])[0], "\n</think>\n\nHello<|end|>")]
    # The tokens of the prompt are its own: its line break and that of the answer merge elsewhere.
    ids = tokenizer(prompts(tokenizer, [ASK])[0], add_special_tokens=False)["input_ids"]
    assert row.examples[0].input_ids_L[: len(ids)].tolist() == ids
    quoting = say("Say <|end|> now")
    row = encode(tokenizer, ASK, quoting, thinking=Thinking.close)
    assert parts(tokenizer, row)[0][1] == "\n</think>\n\nSay <|end|> now<|end|>"
    assert row.examples[0].input_ids_L.tolist().count(tokenizer.eos_token_id) == 2


def test_rewritten_turns_are_trained_as_they_are_said(tokenizer_of: TokenizerOf) -> None:
    tokenizer = tokenizer_of(HYBRID)
    messages = [ASK, say("Hello", "why"), MORE, say("Bye")]
    row = encode(tokenizer, *messages)
    asked = prompts(tokenizer, [ASK], messages[:3])
    empty = "<think>\n\n</think>\n\n"
    assert parts(tokenizer, row) == [
        (asked[0], "<think>\nwhy\n</think>\n\nHello<|end|>"),
        (asked[1] + empty, "Bye<|end|>"),  # the empty block is the prompt's
    ]
    assert (row.by_turns, row.faults) == (True, ["empty_thinking"])
    closed = encode(tokenizer, *messages, thinking=Thinking.close)
    assert parts(tokenizer, closed)[1] == (asked[1], empty + "Bye<|end|>")
    assert closed.faults == []
    # What is proven as a whole stays one sample.
    one = encode(tokenizer, ASK, say("Hello", "why"))
    assert (len(one.examples), one.by_turns) == (1, False)


def test_thoughts_by_policy(tokenizer_of: TokenizerOf) -> None:
    tokenizer = tokenizer_of(HYBRID)
    messages = [ASK, say("<think>why</think>Hello"), MORE, say("Bye", "so")]
    said = {
        thinking: [said for _, said in parts(tokenizer, encode(tokenizer, *messages, **choice))]
        for thinking in (Thinking.last, Thinking.none)
        for choice in [{"thinking": thinking}]
    }
    assert said[Thinking.last] == ["Hello<|end|>", "<think>\nso\n</think>\n\nBye<|end|>"]
    assert said[Thinking.none] == ["Hello<|end|>", "Bye<|end|>"]


def test_an_open_block_is_closed_where_the_run_takes_thoughts_out(
    tokenizer_of: TokenizerOf,
) -> None:
    tokenizer = tokenizer_of(CUTS)
    messages = [ASK, say("Hello", "why"), MORE, say("Bye", "so")]
    for thinking, last in (
        (Thinking.none, "\n</think>\n\nBye<|end|>"),
        (Thinking.last, "so\n</think>\n\nBye<|end|>"),
    ):
        row = encode(tokenizer, *messages, thinking=thinking)
        assert [said for _, said in parts(tokenizer, row)] == ["\n</think>\n\nHello<|end|>", last]
    with pytest.raises(DataError, match=r"messages\[3\] opens its thoughts"):
        encode(tokenizer, *messages[:3], say("Bye"), thinking=Thinking.last)


def test_thoughts_behind_a_prompt_that_closes_them(tokenizer_of: TokenizerOf) -> None:
    tokenizer = tokenizer_of(HYBRID)
    off = {"variables": {"enable_thinking": False}}
    row = encode(tokenizer, ASK, say("Hello"), **off)
    asked = prompts(tokenizer, [ASK], enable_thinking=False)
    assert asked[0].endswith("</think>\n\n")
    assert parts(tokenizer, row) == [(asked[0], "Hello<|end|>")]
    with pytest.raises(DataError, match="closes its thoughts") as caught:
        encode(tokenizer, ASK, say("Hello", "why"), **off)
    assert "template.thinking=none" in caught.value.fix
    row = encode(tokenizer, ASK, say("Hello", "why"), **off, thinking=Thinking.none)
    assert parts(tokenizer, row) == [(asked[0], "Hello<|end|>")]


def test_thoughts_that_a_template_does_not_know(tokenizer_of: TokenizerOf) -> None:
    """No form is made up: how such a model would write them, nobody knows."""
    for form in (Form.auto, Form.turns):
        with pytest.raises(DataError, match=r"write all of messages\[1\]\.reasoning_content"):
            encode(tokenizer_of(CHATML), ASK, say("4", "2 and 2"), form=form)


# ------------------------------------------------------------------------------- variables


def test_variables_of_the_run_and_of_a_row(tokenizer_of: TokenizerOf) -> None:
    named = CHATML.replace("'<|start|>assistant\n'", "'<|start|>assistant ' + tone.of + '\n'")
    tokenizer = tokenizer_of("{{ tone.of }} {{ more }}" + named)
    run = {"variables": {"tone": {"of": "dry"}, "more": 3}}
    for row, variables in (
        ({}, run["variables"]),
        ({"variables": {"tone": {"of": "warm"}}}, {"tone": {"of": "warm"}, "more": 3}),
    ):
        found = encode(tokenizer, ASK, say("Hello"), row=row, **run)
        asked = prompts(tokenizer, [ASK], **variables)
        assert parts(tokenizer, found) == [(asked[0], "Hello<|end|>")]


@pytest.mark.parametrize("name", ["messages", "tools", "documents", "add_generation_prompt"])
def test_names_that_are_no_variables(tokenizer_of: TokenizerOf, name: str) -> None:
    with pytest.raises(ConfigError, match=rf"template\.variables\.{name}"):
        encode(tokenizer_of(CHATML), ASK, say("Hello"), variables={name: 1})


def test_a_refusal_names_the_variable_that_helps(tokenizer_of: TokenizerOf) -> None:
    before, after = HYBRID.split("{% if enable_thinking is defined", 1)
    thinks = before + "{% if enable_thinking is defined" + after.replace(
        "{% endif %}{% endif %}", "{% else %}{{ '<think>\n' }}{% endif %}{% endif %}"
    )  # fmt: skip
    with pytest.raises(DataError, match="opens its thoughts") as caught:
        encode(tokenizer_of(thinks), ASK, say("Hello"))
    assert caught.value.fix.startswith("set template.variables={enable_thinking: false}, with")
    on_row = '"chat_template_kwargs": {"enable_thinking": false}'
    assert on_row in caught.value.fix
    variables = json.loads(f"{{{on_row}}}")["chat_template_kwargs"]
    helped = encode(tokenizer_of(thinks), ASK, say("Hello"), row={"variables": variables})
    assert helped.faults == []
    other = CHATML.replace(ASKED, "{% if add_generation_prompt %}{{ '<|start|>' }}"
        "{{ 'assistant\n' if plain else 'bot\n' }}{% endif %}")  # fmt: skip
    with pytest.raises(DataError, match="does not begin") as caught:
        encode(tokenizer_of(other), ASK, say("Hello"), form=Form.conversation)
    assert caught.value.fix.startswith("set template.variables={plain: true}, with")


def test_the_clock_is_fixed(tokenizer_of: TokenizerOf) -> None:
    dated = "{{ '<|start|>system\n' + strftime_now('%d %b %Y') + '<|end|>\n' }}" + CHATML
    tokenizer = tokenizer_of(dated)
    assert load_templates(Template(), tokenizer).reads_clock()
    fixed = Template(variables={"strftime_now": "2026-07-26"})
    assert not load_templates(fixed, tokenizer).reads_clock()
    row = encode(tokenizer, ASK, say("Hello"), variables=fixed.variables)
    assert parts(tokenizer, row)[0][0].startswith("<|start|>system\n26 Jul 2026<|end|>\n")
    by_name = dated.replace("strftime_now('", "day if day is defined else strftime_now('")
    named = Template(variables={"day": "1 May"})
    assert not load_templates(named, tokenizer_of(by_name)).reads_clock()
    with pytest.raises(ConfigError, match="must be the date"):
        encode(tokenizer, ASK, say("Hello"), variables={"strftime_now": "yesterday"})


# ------------------------------------------------------------------------------- ends


def test_the_next_mark_ends_a_turn_where_generation_stops_at_it(tokenizer_of: TokenizerOf) -> None:
    """As GLM: nothing ends a turn but the mark of who speaks next."""
    endless = (
        "{% for m in messages %}{% if m.role == 'user' %}{{ '<|start|>' + m.content }}"
        "{% elif m.role == 'assistant' %}{{ '<|close|>' + m.content }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|close|>' }}{% endif %}"
    )
    tokenizer = tokenizer_of(endless)
    messages = [ASK, say("Hello"), MORE, say("Bye")]
    with pytest.raises(DataError, match="no end-of-turn token") as caught:
        encode(tokenizer, *messages)
    assert "template.end_of_turn='<|start|>'" in caught.value.fix
    for choice in ({"ends": (END, START)}, {"end_of_turn": START}):
        row = encode(tokenizer, *messages, **choice)
        assert (len(row.examples), row.by_turns) == (1, False)
        assert parts(tokenizer, row) == [("<|start|>Hi<|close|>", "Hello<|start|>Bye<|start|>")]
        text = tokenizer.decode(row.examples[0].input_ids_L)
        assert text == "<|start|>Hi<|close|>Hello<|start|>More<|close|>Bye<|start|>"
    # Another token, which stands nowhere in the text: every turn for itself.
    row = encode(tokenizer, *messages, end_of_turn=END)
    asked = prompts(tokenizer, [ASK], messages[:3])
    assert parts(tokenizer, row) == [(asked[0], "Hello<|end|>"), (asked[1], "Bye<|end|>")]


def test_an_end_that_stands_between_turns_only(tokenizer_of: TokenizerOf) -> None:
    between = CHATML.replace("m.content + '<|end|>\n'", "m.content + ('' if loop.last and "
        "m.role == 'assistant' else '<|end|>\n')")  # fmt: skip
    tokenizer = tokenizer_of(between)
    row = encode(tokenizer, ASK, say("Hello"), MORE, say("Bye"))
    assert not row.by_turns
    assert parts(tokenizer, row) == [("<|start|>user\nHi<|end|>\n<|start|>assistant\n",
        "Hello<|end|>Bye<|end|>")]  # fmt: skip


def test_a_prompt_that_is_always_written_is_nobodys_answer(tokenizer_of: TokenizerOf) -> None:
    """With nothing between the end of a turn and the next header."""
    always = CHATML.replace("<|end|>\n", "<|end|>").split("{% if add_generation_prompt")[0]
    always += "{{ '<|start|>assistant\n' }}"
    tokenizer = tokenizer_of(always)
    for form in (Form.auto, Form.turns):
        row = encode(tokenizer, ASK, say("Hello"), MORE, say("Bye"), form=form)
        said = "".join(said for _, said in parts(tokenizer, row))
        assert said == "Hello<|end|>Bye<|end|>"
        last = tokenizer.decode(row.examples[-1].input_ids_L)
        assert last.endswith("assistant\nBye<|end|>")


# ------------------------------------------------------------------------------- first turns


def test_an_unasked_first_turn(tokenizer_of: TokenizerOf) -> None:
    in_loop = CHATML.replace("{% endfor %}", "{% if loop.last and add_generation_prompt %}"
        "{{ '<|start|>assistant\n' }}{% endif %}{% endfor %}").replace(ASKED, "")  # fmt: skip
    tokenizer = tokenizer_of(in_loop)
    for form in (Form.auto, Form.turns):
        row = encode(tokenizer, say("Welcome"), ASK, say("Hello"), form=form)
        assert [said for _, said in parts(tokenizer, row)] == ["Hello<|end|>"]
        assert row.faults == ["assistant_first"]
    # Nobody writes the header for it, so it cannot be asked for either.
    with pytest.raises(DataError, match=r"messages\[0\] is of the assistant and stands before"):
        encode(tokenizer, say("Welcome"), ASK, say("Hello"), row={"weights": (1.0, None, None)})
    with pytest.raises(DataError, match="which nobody asked"):
        encode(tokenizer, say("Welcome"), ASK)


# ------------------------------------------------------------------------------- by name


def test_templates_by_name(tokenizer_of: TokenizerOf) -> None:
    tokenizer = tokenizer_of(CHATML)
    tools = CHATML.replace("{% for m", "{{ '<|start|>tools\n' + (tools | tojson) + '<|end|>\n' }}"
        "{% for m", 1)  # fmt: skip
    tool = {"type": "function", "function": {"name": "add", "parameters": {}}}
    tokenizer.chat_template = {"default": CHATML, "tool_use": tools, "rag": "R" + CHATML}
    for row, variables in (({}, {}), ({"tools": (tool,)}, {"tools": [tool]})):
        found = encode(tokenizer, ASK, say("Hello"), row=row)
        assert parts(tokenizer, found) == [
            (prompts(tokenizer, [ASK], **variables)[0], "Hello<|end|>")
        ]
    chosen = encode(tokenizer, ASK, say("Hello"), variant="rag")
    assert parts(tokenizer, chosen)[0][0].startswith("R<|start|>")

    tokenizer.chat_template = {"tool_use": tools, "rag": "R" + CHATML}
    assert parts(tokenizer, encode(tokenizer, ASK, say("Hello"), row={"tools": (tool,)}))
    with pytest.raises(DataError, match=r"rows\.jsonl:7: .*by name \(rag, tool_use\)") as caught:
        encode(tokenizer, ASK, say("Hello"))
    assert "template.variant=" in caught.value.fix
    tokenizer.chat_template = {"rag": CHATML, "web": CHATML}
    with pytest.raises(ConfigError, match=r"template\.variant: .*\(rag, web\), and none"):
        encode(tokenizer, ASK, say("Hello"))
    with pytest.raises(ConfigError, match=r"there is no template 'rg': .* has rag, web"):
        encode(tokenizer, ASK, say("Hello"), variant="rg")


# ------------------------------------------------------------------------------- the limit


def test_a_long_turn_keeps_what_is_said_and_the_end_of_its_prompt(
    tokenizer_of: TokenizerOf,
) -> None:
    tokenizer = tokenizer_of(CHATML)
    messages = [ASK, say("Hello"), {"role": "user", "content": "More of it"}, say("Bye now")]
    row = Record(channel="c", where="r:1", messages=tuple(messages))
    choice = Template(form=Form.turns)
    whole = Encoder(tokenizer, choice, max_length=999).encode(row).examples[1]
    said = int((whole.weight_L > 0).sum())
    for limit in range(said + 1, len(whole.input_ids_L)):
        encoder = Encoder(tokenizer, choice, max_length=limit, long_rows=LongRows.split)
        samples = encoder.encode(row).examples[1:]
        ids = [sample.input_ids_L.tolist() for sample in samples]
        assert max(map(len, ids)) <= limit
        if len(samples) > 1:  # not even a token of the header fits before what is said
            start = tokenizer.convert_tokens_to_ids(START)
            assert start not in whole.input_ids_L[len(whole.input_ids_L) - limit : -said]
            continue
        assert ids[0] == whole.input_ids_L[-len(ids[0]) :].tolist()
        assert tokenizer.decode(ids[0][:1]) in (START, END)
        assert samples[0].truncated and samples[0].weight_L.sum() == said
