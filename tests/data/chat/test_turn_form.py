"""Turns as samples of their own: as they are asked for, as they are said, and how they end."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from tokenizers import Tokenizer

from posttrain_dist.data import Form, Template, Thinking
from posttrain_dist.data.chat.encoder import Encoder, RowExamples
from posttrain_dist.data.chat.rendering.template_choice import load_templates
from posttrain_dist.errors import ConfigError, DataError, ModelError, PosttrainError
from posttrain_dist.flow import Record

TokenizerOf = Callable[..., Any]
START, END, PAD = "<|start|>", "<|end|>", "<|pad|>"
HEADER = "{{ '<|start|>' + m.role + '\n' }}"
ASKED = "{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"
CHATML = "{% for m in messages %}" + HEADER + "{{ m.content + '<|end|>\n' }}{% endfor %}" + ASKED
# As Qwen3: thoughts behind the last question only, an empty block where there are none.
HYBRID = (
    "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}{% for m in messages %}" + HEADER + ""
    "{% if m.role == 'assistant' and loop.index0 > ns.last %}"
    "{{ '<think>\n' + (m.reasoning_content or '') + '\n</think>\n\n' }}{% endif %}"
    "{{ m.content + '<|end|>\n' }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start|>assistant\n' }}{% if enable_thinking is defined and not enable_thinking %}"
    "{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)
# As the distilled R1: the prompt opens thoughts, and they are cut out of every turn.
CUTS = (
    "{% for m in messages %}" + HEADER + "{{ m.content.split('</think>')[-1].lstrip('\n') }}"
    "{{ '<|end|>' }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start|>assistant\n<think>\n' }}{% endif %}"
)
ASK, MORE = {"role": "user", "content": "Hi"}, {"role": "user", "content": "More"}


def say(content: str, thoughts: str = "") -> dict[str, Any]:
    beside = {"reasoning_content": thoughts} if thoughts else {}
    return {"role": "assistant", "content": content, **beside}


def encode(
    tokenizer: Any,
    *messages: dict[str, Any],
    ends: tuple[str, ...] = (),
    row: dict[str, Any] | None = None,
    **choice: Any,
) -> RowExamples:
    record = Record(channel="c", where="rows.jsonl:7", messages=messages, **(row or {}))
    return Encoder(tokenizer, Template(**choice), max_length=999, ends=ends).encode(record)


def parts(tokenizer: Any, row: RowExamples) -> list[tuple[str, str]]:
    """Of each sample: what stands before the first target, and the targets."""
    found = []
    for example in row.examples:
        first = int((example.weight_L > 0).argmax())
        ids, weights = example.input_ids_L.tolist(), example.weight_L[first:]
        said = [token for token, weight in zip(ids[first:], weights, strict=True) if weight]
        found.append((tokenizer.decode(ids[:first]), tokenizer.decode(said)))
    return found


def prompts(tokenizer: Any, *conversations: list[dict[str, Any]], **variables: Any) -> list[str]:
    return [
        tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, **variables
        )
        for messages in conversations
    ]


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


# ------------------------------------------------------------------------------- quoted tokens


def test_a_tokenizer_that_can_spell_a_control_token(tokenizer_of: TokenizerOf) -> None:
    """Its merges make the token out of pieces, as byte-pair ones do that were trained on chats."""
    tokenizer = tokenizer_of(CHATML)
    described = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary, merges = described["model"]["vocab"], described["model"]["merges"]
    for word in ("<|", "<|e", "<|en", "<|end", "<|end|"):
        vocabulary.setdefault(word, len(vocabulary) + 50)
        merges.append([word[:-1], word[-1]])
    merges.append(["<|end|", ">"])
    vocabulary.setdefault(END, tokenizer.eos_token_id)
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(described))
    row = encode(tokenizer, {"role": "user", "content": "What is <|end|>?"}, say("A mark"))
    assert row.faults == ["control_tokens"]
    ids = row.examples[0].input_ids_L.tolist()
    assert ids.count(tokenizer.eos_token_id) == 2  # those that end the two turns
    assert "What is <|end|>?" in tokenizer.decode(ids)


def test_begin_tokens_that_open_every_turn(tokenizer_of: TokenizerOf) -> None:
    """As SmolLM2, whose begin token is that of ChatML's headers."""
    opens = CHATML.replace("'<|start|>'", "bos_token").replace("'<|start|>a", "bos_token + 'a")
    row = encode(tokenizer_of(opens), ASK, say("Hello"), MORE, say("Bye"))
    assert (len(row.examples), row.faults) == (1, [])
    twice = opens.replace("{% for", "{{ bos_token }}{% for", 1)
    with pytest.raises(PosttrainError, match="begins with two"):
        encode(tokenizer_of(twice), ASK, say("Hello"))


def test_ends_that_cannot_be(tokenizer_of: TokenizerOf) -> None:
    with pytest.raises(ConfigError, match=r"template\.end_of_turn: '<\|ende\|>' is no special"):
        encode(tokenizer_of(CHATML), ASK, say("Hello"), end_of_turn="<|ende|>")
    with pytest.raises(ConfigError, match=r"the template ends turns itself, with '<\|end\|>'"):
        encode(tokenizer_of(CHATML), ASK, say("Hello"), end_of_turn=PAD)
    assert encode(tokenizer_of(CHATML), ASK, say("Hello"), end_of_turn=END).faults == []


def test_calls_that_only_the_tools_mark_ends(tokenizer_of: TokenizerOf) -> None:
    """Answers have an end of their own; behind a call, generation stops at the next role."""
    calls = CHATML.replace(
        HEADER + "{{ m.content + '<|end|>\n' }}",
        "{% if m.role == 'tool' %}{{ '<|pad|>' + m.content + '<|end|>' }}{% else %}" + HEADER + ""
        "{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}"
        "{% if not m.tool_calls %}{{ '<|end|>\n' }}{% endif %}{% endif %}",
    )
    tools = "{% if tools %}{{ tools | tojson }}{% endif %}"
    tokenizer = tokenizer_of(tools + calls)
    function = {"name": "add", "arguments": {"a": 1}}
    tool = {"type": "function", "function": {"name": "add", "parameters": {}}}
    asks = {"role": "assistant", "content": "", "tool_calls": [{"function": function}]}
    messages = [ASK, asks, {"role": "tool", "content": "2"}, say("It is 2")]
    for form in (Form.conversation, Form.turns):
        row = encode(tokenizer, *messages, ends=(END, PAD), form=form, row={"tools": (tool,)})
        said = "".join(said for _, said in parts(tokenizer, row))
        assert said == json.dumps(function) + "<|pad|>It is 2<|end|>"
    with pytest.raises(DataError, match="no end-of-turn token"):
        encode(tokenizer, *messages, row={"tools": (tool,)})


def test_a_begin_token_that_opens_each_question_ends_no_answer(tokenizer_of: TokenizerOf) -> None:
    """As Llama 2, where the tokenizer has the marks of a question as tokens."""
    llama2 = (
        "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token + '<|start|> ' + m.content }}"
        "{{ ' <|start|>' }}{% else %}{{ ' ' + m.content + ' <|end|>' }}{% endif %}{% endfor %}"
    )
    tokenizer = tokenizer_of(llama2)
    for form in (Form.conversation, Form.turns):
        row = encode(tokenizer, ASK, say("Hello"), MORE, say("Bye"), form=form)
        said = "".join(said for _, said in parts(tokenizer, row))
        assert said == " Hello <|end|> Bye <|end|>"


# ------------------------------------------------------------------------------- broken ones


def test_variables_that_nothing_reads(tokenizer_of: TokenizerOf) -> None:
    for name, match in (
        ("enable_thinkng", "did you mean 'enable_thinking'"),
        ("x", "may read enable"),
    ):
        with pytest.raises(ConfigError, match=rf"(?s)template\.variables\.{name}: .*{match}"):
            encode(tokenizer_of(HYBRID), ASK, say("Hello"), variables={name: False})
    with pytest.raises(ConfigError, match="it reads none"):
        encode(tokenizer_of(CHATML), ASK, say("Hello"), variables={"enable_thinking": False})
    with pytest.raises(ConfigError, match="is the text 'false', which a template takes for true"):
        encode(tokenizer_of(HYBRID), ASK, say("Hello"), variables={"enable_thinking": "false"})
    # However the template asks for it.
    for asks in (
        "{% if not mood is defined %}{% set mood = 'dry' %}{% endif %}{{ mood }}",
        "{% set mood = mood or 'dry' %}{{ mood }}",
        "{{ mood | default('dry') }}",
    ):
        tokenizer = tokenizer_of(asks + CHATML)
        row = encode(tokenizer, ASK, say("Hello"), variables={"mood": "warm"})
        assert parts(tokenizer, row)[0][0].startswith("warm<|start|>")


def test_a_template_that_draws_by_chance(tokenizer_of: TokenizerOf) -> None:
    with pytest.raises(ModelError, match="tokenizer: chat template: writes another text each time"):
        encode(tokenizer_of("{{ range(9999) | random }}" + CHATML), ASK, say("Hello"))


def test_faults_of_a_template_are_said_to_be_its_own(tokenizer_of: TokenizerOf) -> None:
    with pytest.raises(ModelError, match=r"chat template, line 2: is not valid Jinja"):
        encode(tokenizer_of("{# one #}\n{% for }" + CHATML), ASK, say("Hello"))
    fails = "{# one #}\n{% if messages[0].content == 'Hi' %}\n{{ none.a.b }}{% endif %}" + CHATML
    with pytest.raises(
        DataError, match=r"rows\.jsonl:7: the chat template fails in line 3"
    ) as seen:
        encode(tokenizer_of(fails), ASK, say("Hello"))
    assert seen.value.fix.startswith("correct the template (tokenizer: chat template)")
    refuses = "{{ raise_exception('no') if messages[0].content == 'Hi' }}" + CHATML
    with pytest.raises(DataError, match="refuses this conversation: no") as seen:
        encode(tokenizer_of(refuses), ASK, say("Hello"))
    assert "order or roles" in seen.value.fix


def test_a_template_that_writes_no_answer(tokenizer_of: TokenizerOf) -> None:
    mute = CHATML.replace("{{ m.content", "{{ '' if m.role == 'assistant' else m.content")
    for form in (Form.auto, Form.turns):
        with pytest.raises(DataError, match=r"does not write (all of )?messages\[1\]\.content"):
            encode(tokenizer_of(mute), ASK, say("Hello"), form=form)


def test_an_end_that_the_tokenizer_writes_in_pieces(tokenizer_of: TokenizerOf) -> None:
    """A token that counts as a word of its own only is none directly behind an answer."""
    tokenizer = tokenizer_of(CHATML)
    described = json.loads(tokenizer.backend_tokenizer.to_str())
    for token in described["added_tokens"]:
        token["single_word"] = token["content"] == END
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(described))
    with pytest.raises(DataError, match=r"does not write <\|end\|> as one token"):
        encode(tokenizer, ASK, say("Hello"))
    assert "end_of_turn" in encode(tokenizer, ASK, say("Hello"), strict=False).faults
