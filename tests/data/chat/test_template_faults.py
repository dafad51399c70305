"""Templates and tokenizers that are broken or odd: what is said of them, and what cannot be."""

from __future__ import annotations

import json
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from posttrain_dist.data import Form
from posttrain_dist.errors import ConfigError, DataError, ModelError, PosttrainError

TokenizerOf = Callable[..., Any]
_samples = runpy.run_path(str(Path(__file__).with_name("turn_samples.py")))
END = _samples["END"]
PAD = _samples["PAD"]
HEADER = _samples["HEADER"]
CHATML = _samples["CHATML"]
HYBRID = _samples["HYBRID"]
ASK = _samples["ASK"]
MORE = _samples["MORE"]
say = _samples["say"]
encode = _samples["encode"]
parts = _samples["parts"]


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


def test_variables_of_a_row_that_nothing_reads(tokenizer_of: TokenizerOf) -> None:
    for name, faults in (("enable_thinkng", ["empty_thinking", "unread_variables"]),
        ("enable_thinking", ["empty_thinking"])):  # fmt: skip
        row = encode(tokenizer_of(HYBRID), ASK, say("Hello"), row={"variables": {name: True}})
        assert sorted(row.faults) == faults


@pytest.mark.parametrize("value", [float("nan"), float("inf"), (1, 2), {1: 2}, "\ud800", {1, 2}])
def test_variables_that_no_json_has(tokenizer_of: TokenizerOf, value: Any) -> None:
    with pytest.raises(ConfigError, match=r"template\.variables\.enable_thinking: .*no JSON has"):
        encode(
            tokenizer_of(HYBRID), ASK, say("Hello"), variables={"enable_thinking": {"a": [value]}}
        )
