"""Shipped templates: what they write, against the published formats, and what they mask."""
# ruff: noqa: RUF001 - DeepSeek writes its tokens with a full-width bar

from __future__ import annotations

import hashlib
import runpy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from posttrain_dist.data import Form, Template, Thinking
from posttrain_dist.data.chat.conversation import Conversation
from posttrain_dist.data.chat.encoder import Encoder
from posttrain_dist.data.chat.rendering.template_choice import load_templates, template_names
from posttrain_dist.data.chat.turn_spans import turn_spans
from posttrain_dist.errors import ConfigError, DataError, ModelError
from posttrain_dist.flow import Record

one = runpy.run_path(str(Path(__file__).with_name("supervised_text.py")))["one"]

TokenizerOf = Callable[..., Any]
ROOT = Path(__file__).resolve().parents[3]

ASK = {"role": "user", "content": "Hi"}
SAY = {"role": "assistant", "content": "Hello"}
MORE = {"role": "user", "content": "More"}
END = {"role": "assistant", "content": "Bye"}
SYSTEM = {"role": "system", "content": "Be kind"}
CHAT = [SYSTEM, ASK, SAY, MORE, END]
TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds",
        "parameters": {"type": "object", "properties": {"a": {"type": "number"}}},
    },
}
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [
        {"type": "function", "id": "abcdefghi", "function": {"name": "add", "arguments": {"a": 1}}}
    ],
}
RESULT = {"role": "tool", "content": "2", "tool_call_id": "abcdefghi"}
TOOL_JSON = (
    '{"type": "function", "function": {"name": "add", "description": "Adds", "parameters": '
    '{"type": "object", "properties": {"a": {"type": "number"}}}}}'
)
HERMES = (
    "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>\n"
    f"{TOOL_JSON}\n</tools>\n\nFor each function call, return a json object with function name "
    "and arguments within <tool_call></tool_call> XML tags:\n<tool_call>\n"
    '{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call><|im_end|>\n'
)

# Family -> the conversation CHAT in its published format; what is supervised stands in ⟦ ⟧.
CHATS = {
    "chatml": (
        "<|im_start|>system\nBe kind<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\n⟦Hello<|im_end|>⟧\n<|im_start|>user\nMore<|im_end|>\n"
        "<|im_start|>assistant\n⟦Bye<|im_end|>⟧\n"
    ),
    "qwen": (
        "<|im_start|>system\nBe kind<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\n⟦Hello<|im_end|>⟧\n<|im_start|>user\nMore<|im_end|>\n"
        "<|im_start|>assistant\n⟦<think>\n\n</think>\n\nBye<|im_end|>⟧\n"
    ),
    "llama2": (
        "<s>[INST] <<SYS>>\nBe kind\n<</SYS>>\n\nHi [/INST]⟦ Hello </s>⟧<s>[INST] More [/INST]"
        "⟦ Bye </s>⟧"
    ),
    "llama3": (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe kind<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n⟦Hello<|eot_id|>⟧"
        "<|start_header_id|>user<|end_header_id|>\n\nMore<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n⟦Bye<|eot_id|>⟧"
    ),
    "mistral": "<s>[INST] Hi[/INST]⟦ Hello</s>⟧[INST] Be kind\n\nMore[/INST]⟦ Bye</s>⟧",
    "gemma": (
        "<bos><start_of_turn>user\nBe kind\n\nHi<end_of_turn>\n"
        "<start_of_turn>model\n⟦Hello<end_of_turn>⟧\n<start_of_turn>user\nMore<end_of_turn>\n"
        "<start_of_turn>model\n⟦Bye<end_of_turn>⟧\n"
    ),
    "phi": (
        "<|system|>\nBe kind<|end|>\n<|user|>\nHi<|end|>\n<|assistant|>\n⟦Hello<|end|>⟧\n"
        "<|user|>\nMore<|end|>\n<|assistant|>\n⟦Bye<|end|>⟧\n"
    ),
    "zephyr": (
        "<|system|>\nBe kind</s>\n<|user|>\nHi</s>\n<|assistant|>\n⟦Hello</s>⟧\n"
        "<|user|>\nMore</s>\n<|assistant|>\n⟦Bye</s>⟧\n"
    ),
    "deepseek": (
        "<｜begin▁of▁sentence｜>Be kind<｜User｜>Hi<｜Assistant｜>⟦Hello<｜end▁of▁sentence｜>⟧"
        "<｜User｜>More<｜Assistant｜>⟦Bye<｜end▁of▁sentence｜>⟧"
    ),
}
# Family -> what follows a last question, for the model to go on.
PROMPTS = {
    "chatml": "Hi<|im_end|>\n<|im_start|>assistant\n",
    "qwen": "Hi<|im_end|>\n<|im_start|>assistant\n",
    "llama2": "<s>[INST] Hi [/INST]",
    "llama3": "Hi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    "mistral": "<s>[INST] Hi[/INST]",
    "gemma": "Hi<end_of_turn>\n<start_of_turn>model\n",
    "phi": "<|user|>\nHi<|end|>\n<|assistant|>\n",
    "zephyr": "<|user|>\nHi</s>\n<|assistant|>\n",
    "deepseek": "<｜User｜>Hi<｜Assistant｜>",
}
TOOL_CHATS = {
    "chatml": (
        f"<|im_start|>system\n{HERMES}<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
        '⟦<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call><|im_end|>⟧\n'
        "<|im_start|>tool\n<tool_response>\n2\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n⟦Bye<|im_end|>⟧\n"
    ),
    "qwen": (
        f"<|im_start|>system\n{HERMES}<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
        '⟦<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call><|im_end|>⟧\n'
        "<|im_start|>user\n<tool_response>\n2\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n⟦<think>\n\n</think>\n\nBye<|im_end|>⟧\n"
    ),
    "llama3": (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nEnvironment: ipython\n"
        "<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nGiven the following functions, "
        "please respond with a JSON for a function call with its proper arguments that best "
        'answers the given prompt.\n\nRespond in the format {"name": function name, "parameters": '
        'dictionary of argument name and its value}.Do not use variables.\n\n{\n    "type": '
        '"function",\n    "function": {\n        "name": "add",\n        "description": "Adds",\n'
        '        "parameters": {\n            "type": "object",\n            "properties": {\n'
        '                "a": {\n                    "type": "number"\n                }\n'
        "            }\n        }\n    }\n}\n\nHi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
        '⟦{"name": "add", "parameters": {"a": 1}}<|eot_id|>⟧'
        '<|start_header_id|>ipython<|end_header_id|>\n\n"2"<|eot_id|>'
        "<|start_header_id|>assistant<|end_header_id|>\n\n⟦Bye<|eot_id|>⟧"
    ),
    "mistral": (
        f"<s>[AVAILABLE_TOOLS] [{TOOL_JSON}][/AVAILABLE_TOOLS][INST] Hi[/INST]"
        '⟦[TOOL_CALLS] [{"name": "add", "arguments": {"a": 1}, "id": "abcdefghi"}]</s>⟧'
        '[TOOL_RESULTS] {"content": "2", "call_id": "abcdefghi"}[/TOOL_RESULTS]⟦ Bye</s>⟧'
    ),
}
FAMILIES = sorted(CHATS)


def plain(golden: str) -> str:
    return golden.replace("⟦", "").replace("⟧", "")


def runs(golden: str) -> list[str]:
    return [part.split("⟧")[0] for part in golden.split("⟦")[1:]]


def record(*messages: dict[str, Any], tools: tuple[dict[str, Any], ...] = ()) -> Record:
    return Record(channel="c", where="rows.jsonl:7", messages=messages, tools=tools)


def supervised(tokenizer: Any, encoded: Any) -> list[str]:
    """Runs of supervised tokens, as text."""
    found: list[list[int]] = [[]]
    for token, weight in zip(encoded.input_ids_L, encoded.weight_L, strict=True):
        if weight:
            found[-1].append(int(token))
        elif found[-1]:
            found.append([])
    return [tokenizer.decode(run) for run in found if run]


def source_of(family: str) -> str:
    path = ROOT / "posttrain_dist/data/chat/templates" / f"{family}.jinja"
    return path.read_text(encoding="utf-8")


def test_all_families_are_shipped_with_their_option() -> None:
    assert set(template_names()) >= set(FAMILIES)
    options = {path.stem for path in (ROOT / "conf/template").glob("*.yaml")}
    assert options == {"tokenizer", *template_names()}
    for name in template_names():
        assert yaml.safe_load((ROOT / f"conf/template/{name}.yaml").read_text())["name"] == name


@pytest.mark.parametrize("family", FAMILIES)
def test_chat_in_the_published_format(family: str, family_tokenizer: TokenizerOf) -> None:
    template = load_templates(Template(name=family), family_tokenizer(family)).plain
    assert template.render(CHAT, "w") == plain(CHATS[family])
    prompt = template.render([ASK], "w", generation_prompt=True)
    assert prompt.endswith(PROMPTS[family])
    # No system prompt of its own, and nothing else before the question.
    assert "Be kind" not in prompt
    assert template.render([ASK, SAY], "w").startswith(prompt)


@pytest.mark.parametrize("family", sorted(TOOL_CHATS))
def test_tools_in_the_published_format(family: str, family_tokenizer: TokenizerOf) -> None:
    tokenizer = family_tokenizer(family)
    row = record(ASK, CALL, RESULT, END, tools=(TOOL,))
    text = load_templates(Template(name=family), tokenizer).plain.render(
        row.messages, "w", tools=[TOOL]
    )
    assert text == plain(TOOL_CHATS[family])
    choice = Template(name=family, form=Form.turns)
    last = [
        supervised(tokenizer, e)
        for e in Encoder(tokenizer, choice, max_length=9999).encode(row).examples
    ]
    # Where a turn has no thoughts, their block is the prompt's.
    expected = [run.removeprefix("<think>\n\n</think>\n\n") for run in runs(TOOL_CHATS[family])]
    assert last == [[run] for run in expected]


def test_arguments_as_json_text_are_written_as_they_are(family_tokenizer: TokenizerOf) -> None:
    call = {
        "type": "function",
        "id": "abcdefghi",
        "function": {"name": "add", "arguments": '{"a": 1}'},
    }
    messages = [ASK, {**CALL, "content": None, "tool_calls": [call]}, RESULT, END]
    for family, golden in TOOL_CHATS.items():
        template = load_templates(Template(name=family), family_tokenizer(family)).plain
        assert template.render(messages, "w", tools=[TOOL]) == plain(golden)


@pytest.mark.parametrize("family", FAMILIES)
def test_golden_mask(family: str, family_tokenizer: TokenizerOf) -> None:
    """By hand, and by transformers' own mask."""
    tokenizer = family_tokenizer(family, source_of(family))
    choice = Template(name=family, form=Form.conversation, thinking=Thinking.close, strict=False)
    encoded = one(Encoder(tokenizer, choice, max_length=999).encode(record(*CHAT)))
    assert supervised(tokenizer, encoded) == runs(CHATS[family])
    theirs = tokenizer.apply_chat_template(
        CHAT, return_dict=True, return_assistant_tokens_mask=True
    )
    assert encoded.input_ids_L.tolist() == theirs["input_ids"]
    assert encoded.weight_L.tolist() == theirs["assistant_masks"]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("messages", [[ASK, SAY], [ASK, SAY, MORE, END], CHAT])
def test_marks_and_prefixes_agree(
    family: str, messages: list[dict[str, str]], family_tokenizer: TokenizerOf
) -> None:
    template = load_templates(Template(name=family), family_tokenizer(family)).plain
    marked = turn_spans(Conversation(template, messages, "w"))
    rewrites = family == "qwen" and len(messages) > 2
    rewrites = rewrites or (family == "mistral" and messages is CHAT)
    by_prefix = Conversation(template, messages, "w", by_marks=False)
    if rewrites:
        with pytest.raises(DataError, match=r"renders earlier turns differently.*messages\["):
            turn_spans(by_prefix)
        choice = Template(name=family, form=Form.conversation)
        with pytest.raises(DataError, match=r"(?s)rows\.jsonl:7.*template\.form=turns"):
            Encoder(family_tokenizer(family), choice, max_length=999).encode(record(*messages))
    else:
        assert turn_spans(by_prefix) == marked


def test_qwen_keeps_thoughts_behind_the_last_question_only(family_tokenizer: TokenizerOf) -> None:
    tokenizer = family_tokenizer("qwen")
    template = load_templates(Template(name="qwen"), tokenizer).plain
    first = {"role": "assistant", "content": "<think>\nwhy\n</think>\n\nHello"}
    last = {"role": "assistant", "content": "Bye", "reasoning_content": "so\n"}
    text = template.render([ASK, first, MORE, last], "w")
    assert text == (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n"
        "<|im_start|>user\nMore<|im_end|>\n"
        "<|im_start|>assistant\n<think>\nso\n</think>\n\nBye<|im_end|>\n"
    )
    exploded = Encoder(tokenizer, Template(name="qwen", form=Form.turns), max_length=999)
    samples, faults, _ = exploded.encode(record(ASK, first, MORE, last))
    assert [supervised(tokenizer, sample) for sample in samples] == [
        ["<think>\nwhy\n</think>\n\nHello<|im_end|>"],
        ["<think>\nso\n</think>\n\nBye<|im_end|>"],
    ]
    assert faults == []


def test_conversation_that_begins_with_the_assistant(family_tokenizer: TokenizerOf) -> None:
    tokenizer = family_tokenizer("zephyr")
    row = record(SAY, ASK, END)
    encoder = Encoder(tokenizer, Template(name="zephyr"), max_length=99)
    encoded = one(encoder.encode(row))
    assert supervised(tokenizer, encoded) == ["Bye</s>"]
    assert encoded.faults == ("assistant_first",)
    # By its own wish, for this template writes an inference prompt without a question.
    encoded = one(encoder.encode(replace(row, weights=(1.0, None, None))))
    assert supervised(tokenizer, encoded) == ["Hello</s>", "Bye</s>"]
    assert encoded.faults == ()
    with pytest.raises(DataError, match=r"rows\.jsonl:7: .*which nobody asked") as caught:
        encoder.encode(record(SAY, ASK))
    assert 'messages[0] "weight": 1' in caught.value.fix
    tokenizer = family_tokenizer("deepseek", "{{ messages[0].role[:0] }}" + source_of("deepseek"))
    encoder = Encoder(tokenizer, Template(form=Form.conversation), max_length=99)
    with pytest.raises(DataError, match=r"rows\.jsonl:7: .*stands before any question"):
        encoder.encode(replace(row, weights=(1.0, None, None)))
    assert supervised(tokenizer, one(encoder.encode(row))) == ["Bye<｜end▁of▁sentence｜>"]
    encoded = one(encoder.encode(replace(row, weights=(0.0, None, None))))
    assert supervised(tokenizer, encoded) == ["Bye<｜end▁of▁sentence｜>"]


# ------------------------------------------------------------------------------------ choosing


def test_digest_is_that_of_the_source(family_tokenizer: TokenizerOf) -> None:
    template = load_templates(Template(name="phi"), family_tokenizer("phi"))
    assert template.sha256 == hashlib.sha256(source_of("phi").encode()).hexdigest()


def test_unknown_name_gives_the_nearest(family_tokenizer: TokenizerOf) -> None:
    with pytest.raises(ConfigError, match=r"template\.name: .*'chatlm', did you mean 'chatml'"):
        load_templates(Template(name="chatlm"), family_tokenizer("chatml"))


def test_template_of_another_family_names_the_tokens_that_are_missing(
    family_tokenizer: TokenizerOf,
) -> None:
    with pytest.raises(ConfigError, match=r"(?s)<\|im_start\|>, <\|im_end\|>.*split into pieces"):
        load_templates(Template(name="chatml"), family_tokenizer("zephyr"))
    with pytest.raises(ConfigError, match="bos_token"):
        load_templates(Template(name="gemma"), family_tokenizer("chatml"))


def test_template_from_a_file(family_tokenizer: TokenizerOf, tmp_path: Path) -> None:
    path = tmp_path / "mine.jinja"
    path.write_text("{{ messages[0].content }}|")
    template = load_templates(Template(name=str(path)), family_tokenizer("chatml")).plain
    assert template.render([ASK], "w") == "Hi|"
    with pytest.raises(ConfigError, match=r"template\.name: .*no\.jinja"):
        load_templates(Template(name=str(tmp_path / "no.jinja")), family_tokenizer("chatml"))


def test_tokenizer_without_a_template_is_told_to_choose_one(
    family_tokenizer: TokenizerOf,
) -> None:
    with pytest.raises(ModelError, match=r"(?s)/models/x: .*no chat template.*zephyr"):
        load_templates(Template(), family_tokenizer("chatml"), Path("/models/x"))
