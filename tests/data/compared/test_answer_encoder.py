"""Answers to one prompt as tokens: against the rendered text, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from posttrain_dist.data import Form, Template, Thinking
from posttrain_dist.data.chat.encoder import Encoder
from posttrain_dist.data.chat.rendering.template_choice import template_names
from posttrain_dist.data.compared.answer_encoder import AnsweredRow, AnswerEncoder
from posttrain_dist.errors import DataError, PosttrainError
from posttrain_dist.flow import Answer, Message, Record

TokenizerOf = Callable[..., Any]
CHATML = (
    "{% for m in messages %}{{ '<|start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content | trim + '<|end|>' + '\n' }}{% endgeneration %}"
    "{% else %}{{ m.content + '<|end|>' + '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"
)


def said(content: str, **rest: Any) -> Message:
    return {"role": "assistant", "content": content, **rest}


def question(content: str) -> Message:
    return {"role": "user", "content": content}


def row(*answers: list[Message], values: tuple[float, ...] = (1.0, 0.0), **rest: Any) -> Record:
    given = tuple(Answer(tuple(a), value) for a, value in zip(answers, values, strict=False))
    return Record(
        channel="c", where="rows.jsonl:7", messages=(question("hello"),), answers=given, **rest
    )


def encode(tokenizer: Any, record: Record, compares: bool = True, **choice: Any) -> AnsweredRow:
    encoder = AnswerEncoder(tokenizer, Template(**choice), compares=compares)
    (found,) = encoder.encode_many([record])
    if isinstance(found, PosttrainError):
        raise found
    return found


def test_prompt_and_answers_are_the_rendered_text_up_to_the_end_of_turn(
    tokenizer_of: TokenizerOf,
) -> None:
    """The line break that the template writes behind the last end token is cut."""
    tokenizer = tokenizer_of(CHATML)
    several = [said("it says"), question("be kind"), said("hello")]
    found = encode(tokenizer, row(several, [said("the system")]))
    prompt = tokenizer.apply_chat_template(
        [question("hello")], tokenize=False, add_generation_prompt=True
    )
    assert tokenizer.decode(found.prompt_L) == prompt
    better, worse = found.answers
    whole = tokenizer.apply_chat_template([question("hello"), *several], tokenize=False)
    assert prompt + tokenizer.decode(better.ids_L) == whole.removesuffix("\n")
    assert tokenizer.decode(worse.ids_L) == "the system<|end|>"
    # The user's turn within an answer stays, and is no target.
    targets = tokenizer.decode(better.ids_L[better.weight_L > 0])
    assert targets == "it says<|end|>hello<|end|>"
    assert worse.weight_L.tolist() == [1] * len(worse.ids_L)
    assert better.ends and worse.ends and (better.value, worse.value) == (1, 0)


QWEN = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
    "{{ '<think>\n' + (m.reasoning_content or '') + '\n</think>\n\n' }}{% endif %}"
    "{{ m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def test_prompts_that_differ_are_refused_and_not_assumed_equal(
    family_tokenizer: TokenizerOf,
) -> None:
    """An empty block of thoughts is the prompt's, so that one prompt holds it, the other not."""
    tokenizer = family_tokenizer("qwen", QWEN)
    record = row([said("hello", reasoning_content="the user asks")], [said("it says")])
    with pytest.raises(DataError, match=r"rows\.jsonl:7: the prompt of answer 2 has other tokens"):
        encode(tokenizer, record)
    # Reported only: the prompt is what both begin with, and the block is the answer's own.
    found = encode(tokenizer, record, strict=False)
    assert "common_prompt" in found.faults
    assert tokenizer.decode(found.prompt_L).endswith("<|im_start|>assistant\n")
    better, worse = (tokenizer.decode(answer.ids_L) for answer in found.answers)
    assert better.startswith("<think>\nthe user asks\n</think>") and better.endswith("<|im_end|>")
    assert worse.startswith("<think>\n\n</think>") and worse.endswith("it says<|im_end|>")
    assert tokenizer.decode(found.answers[1].ids_L[found.answers[1].weight_L > 0]) == (
        "it says<|im_end|>"
    )
    closed = encode(tokenizer, record, thinking=Thinking.close)
    assert not closed.faults and all(answer.weight_L.all() for answer in closed.answers)


CLOSES = (  # in the prompt alone stands a closed block of thoughts: whole, no row is right
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n\n</think>\n\n' }}"
    "{% endif %}"
)


def test_all_answers_of_a_row_are_in_the_form_that_all_of_them_pass(
    family_tokenizer: TokenizerOf,
) -> None:
    tokenizer = family_tokenizer("qwen", CLOSES)
    found = encode(tokenizer, row([said("hello kind")], [said("it says")]))
    assert tokenizer.decode(found.prompt_L).endswith("assistant\n<think>\n\n</think>\n\n")
    assert [tokenizer.decode(answer.ids_L) for answer in found.answers] == [
        "hello kind<|im_end|>",
        "it says<|im_end|>",
    ]
    long = [said("hello"), question("be kind"), said("it says")]
    with pytest.raises(DataError, match="inference prompt"):
        encode(tokenizer, row(long, [said("it says")]))
    with pytest.raises(DataError, match=r"several turns, and template\.form=turns"):
        encode(tokenizer, row(long, [said("it says")]), form=Form.turns)


@pytest.mark.parametrize(
    ("answers", "values", "what"),
    [
        (["kind", "kind "], (1.0, 0.0), "1 and 2 are the same tokens, and are worth 1 and 0"),
        (["kind", "hello"], (2.0, 2.0), "no two answers of different scores"),
        (["kind"], (2.0,), "has one answer"),
    ],
)  # fmt: skip
def test_a_row_that_compares_nothing_is_refused(
    tokenizer_of: TokenizerOf, answers: list[str], values: tuple[float, ...], what: str
) -> None:
    record = row(*([said(answer)] for answer in answers), values=values)
    with pytest.raises(DataError, match=what) as refused:
        encode(tokenizer_of(CHATML), record)
    assert refused.value.where == "rows.jsonl:7"
    assert len(encode(tokenizer_of(CHATML), record, compares=False).answers) == len(answers)


SAMPLED = ("gemma", "llama3", "r1")
FAMILIES = [
    pytest.param(name, marks=[] if name in SAMPLED else [pytest.mark.slow])
    for name in template_names()
]


@pytest.mark.parametrize("family", FAMILIES)
def test_prompt_and_answer_are_what_sft_makes_of_the_conversation(
    family: str, family_tokenizer: TokenizerOf
) -> None:
    """Every shipped template: the same tokens and targets, up to the last one."""
    tokenizer = family_tokenizer(family)
    choice: dict[str, Any] = {
        "name": family,
        "thinking": Thinking.close,
    }  # some prompts open a block of thoughts
    record = row([said("it says hello")], [said("be kind")])
    found = encode(tokenizer, record, **choice)
    sft = Encoder(tokenizer, Template(**choice), max_length=9999)
    for answer, tokens in zip(record.answers, found.answers, strict=True):
        conversation = Record("c", "rows.jsonl:7", (*record.messages, *answer.messages))
        ((whole,), *_) = sft.encode(conversation)
        behind = int(whole.weight_L.nonzero()[0][-1]) + 1
        ours = [*found.prompt_L.tolist(), *tokens.ids_L.tolist()]
        assert ours == whole.input_ids_L[:behind].tolist()
        targets = [0.0] * len(found.prompt_L) + tokens.weight_L.tolist()
        assert targets == whole.weight_L[:behind].tolist()
        assert tokens.ends and tokens.weight_L.all()
