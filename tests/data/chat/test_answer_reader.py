"""Answers taken apart: what each shipped template writes of a turn is read back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from posttrain_dist.data import Template
from posttrain_dist.data.chat.rendering.answer_reader import AnswerReader
from posttrain_dist.data.chat.rendering.template_choice import load_templates, template_names

TokenizerOf = Callable[..., Any]
ASK = {"role": "user", "content": "Which city?"}
# Formats with a place for thoughts.
WITH_THOUGHTS = ("qwen", "qwen3.5", "glm", "r1", "cohere", "gemma4", "gpt-oss")


def reader_of(family_tokenizer: TokenizerOf, family: str) -> tuple[Any, AnswerReader]:
    plain = family_tokenizer(family)
    source = load_templates(Template(name=family), plain).sources["default"]
    tokenizer = family_tokenizer(family, source)
    return tokenizer, AnswerReader(tokenizer)


@pytest.mark.parametrize(
    ("family", "thoughts"),
    [
        *((family, "") for family in template_names()),
        *((family, "It rains.\nSo: inside.") for family in WITH_THOUGHTS),
    ],
)
def test_what_a_template_writes_is_read_back(
    family: str, thoughts: str, family_tokenizer: TokenizerOf
) -> None:
    tokenizer, reader = reader_of(family_tokenizer, family)
    variables = {"enable_thinking": True} if family == "gemma4" else {}
    options = {"tokenize": False, **variables}
    prompt = tokenizer.apply_chat_template([ASK], add_generation_prompt=True, **options)
    words = "Brno, of course.\n\nIt is drier."
    turn = {"role": "assistant", "content": words}
    if thoughts:
        turn |= {"reasoning_content": thoughts, "thinking": thoughts}
    text = tokenizer.apply_chat_template([ASK, turn], **options)
    assert text.startswith(prompt)
    found = reader.read(text[len(prompt) :])
    assert (found.words.strip(), found.thoughts) == (words, thoughts)
    # Through the tokens, as they come from a model, and while it still writes.
    ids = tokenizer(text[len(prompt) :], add_special_tokens=False)["input_ids"]
    assert reader.read(tokenizer.decode(ids)) == found
    for length in range(len(ids)):
        shown = reader.read(tokenizer.decode(ids[:length])).shown
        assert not any(name in shown for name in tokenizer.all_special_tokens)


def test_a_template_that_shows_no_thoughts(family_tokenizer: TokenizerOf) -> None:
    _, reader = reader_of(family_tokenizer, "chatml")
    assert reader.read("<think>\nhm\n</think>\n\nYes<|im_end|>") == ("Yes", "hm")
    assert reader.read("hm</think>Yes<|im_end|>") == ("Yes", "hm")  # the prompt opened them
    assert reader.read(" as it is \n<|im_end|>") == (" as it is \n", "")
