"""Masks against ones written by hand, and one derivation against the other."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from posttrain_dist.data.masking import Encoder, token_weights
from posttrain_dist.data.template import ChatTemplate
from posttrain_dist.errors import DataError, ModelError
from posttrain_dist.flow import Record

CHATML = (
    "{% for m in messages %}{{ '<|start|>' + m.role + '\n' + m.content + '<|end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"
)
# Marks around content and end token.
MARKED = (
    "{% for m in messages %}{{ '<|start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content + '<|end|>' }}{% endgeneration %}"
    "{% else %}{{ m.content + '<|end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"
)
# Marks around the content alone.
NARROW = MARKED.replace(
    "{{ m.content + '<|end|>' }}{% endgeneration %}",
    "{{ m.content }}{% endgeneration %}{{ '<|end|>' }}",
)
# No token ends a user's turn, so what follows an answer's mark may be `<|start|>`.
NO_END = (
    "{% for m in messages %}{{ '<|start|>' + m.role + ':' }}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant:' }}{% endif %}"
)
# As Qwen3: a turn is rendered differently once another follows.
SHIFTING = (
    "{% for m in messages %}{{ '<|start|>' + m.role + '\n' }}"
    "{% if loop.last and m.role == 'assistant' %}{{ '<think></think>' }}{% endif %}"
    "{{ m.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"
)


def tokenizer_of(template: str | None, trim_offsets: bool = False) -> Any:
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    if trim_offsets:
        from tokenizers import processors

        inner.post_processor = processors.ByteLevel(trim_offsets=True)
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|bos|>", "<|start|>", "<|end|>", "<|pad|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(["user", "assistant", "system", "hello"], trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token="<|bos|>",
        eos_token="<|end|>",
        pad_token="<|pad|>",
        extra_special_tokens=["<|start|>"],
    )
    wrapped.chat_template = template
    return wrapped


def record(*turns: tuple[str, str]) -> Record:
    messages = tuple({"role": role, "content": content} for role, content in turns)
    return Record(channel="c", where="rows.jsonl:7", messages=messages)


CHAT = record(("system", "be kind"), ("user", "hi"), ("assistant", "hello"), ("user", "?"))
TWO = record(*[(m["role"], m["content"]) for m in CHAT.messages], ("assistant", " \n🙂"))


def supervised(tokenizer: Any, row: Record, max_length: int = 999) -> list[str]:
    """Runs of supervised tokens, as text."""
    example = Encoder(tokenizer, "messages", max_length).encode(row, 0, 0)
    runs: list[list[int]] = [[]]
    for token, weight in zip(example.input_ids_L, example.weight_L, strict=True):
        if weight:
            runs[-1].append(int(token))
        elif runs[-1]:
            runs.append([])
    return [tokenizer.decode(run) for run in runs if run]


@pytest.mark.parametrize("template", [CHATML, MARKED, NARROW])
@pytest.mark.parametrize("trim_offsets", [False, True])
def test_mask_by_hand(template: str, trim_offsets: bool) -> None:
    tokenizer = tokenizer_of(template, trim_offsets)
    # Spaces and the last byte of the emoji included; no header, no line break behind the end.
    assert supervised(tokenizer, TWO) == ["hello<|end|>", " \n🙂<|end|>"]
    assert supervised(tokenizer, CHAT) == ["hello<|end|>"]


def test_mask_token_by_token() -> None:
    tokenizer = tokenizer_of(CHATML)
    row = record(("user", "a"), ("assistant", "b"))
    example = Encoder(tokenizer, "messages", 99).encode(row, 3, 5)
    tokens = [tokenizer.decode([token]) for token in example.input_ids_L]
    golden = ["<|start|>", "user", "\n", "a", "<|end|>", "\n"]
    golden += ["<|start|>", "assistant", "\n", "b", "<|end|>", "\n"]
    assert tokens == golden
    assert example.weight_L.tolist() == [0] * 9 + [1, 1, 0]
    assert (example.channel, example.sample_id, example.truncated) == (3, 5, False)


@pytest.mark.parametrize("template", [MARKED, NARROW])
@pytest.mark.parametrize("row", [CHAT, TWO, record(("user", "x"), ("assistant", ""))])
def test_marks_and_prefixes_agree(template: str, row: Record) -> None:
    chat = ChatTemplate(tokenizer_of(template))
    assert chat.marked_spans(row.messages, "w") == chat.prefix_spans(row.messages, "w")


def test_marks_agree_with_transformers() -> None:
    tokenizer = tokenizer_of(MARKED)
    theirs = tokenizer.apply_chat_template(
        list(CHAT.messages), return_dict=True, return_assistant_tokens_mask=True
    )
    ours = Encoder(tokenizer, "messages", 999).encode(CHAT, 0, 0)
    assert ours.input_ids_L.tolist() == theirs["input_ids"]
    assert ours.weight_L.tolist() == theirs["assistant_masks"]


def test_next_header_is_not_taken_for_the_end_of_a_turn() -> None:
    assert supervised(tokenizer_of(NO_END), TWO) == ["hello", " \n🙂"]


def test_an_end_token_in_the_content_does_not_end_the_turn() -> None:
    row = record(("user", "x"), ("assistant", "say <|end|> now"), ("user", "y"))
    assert supervised(tokenizer_of(CHATML), row) == ["say <|end|> now<|end|>"]


def test_template_whose_prefixes_do_not_nest_is_refused() -> None:
    with pytest.raises(ModelError, match=r"(?s)rows\.jsonl:7.*messages\[2\].*\{% generation %\}"):
        supervised(tokenizer_of(SHIFTING), TWO)
    single = record(("user", "x"), ("assistant", "y"))
    assert supervised(tokenizer_of(SHIFTING), single) == ["<think></think>y<|end|>"]


def test_template_that_refuses_a_row_names_the_row() -> None:
    strict = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(DataError, match=r"rows\.jsonl:7.*roles must alternate"):
        supervised(tokenizer_of(strict), CHAT)
    with pytest.raises(ModelError, match="not valid Jinja"):
        supervised(tokenizer_of("{% for %}"), CHAT)


def test_mask_without_a_token_names_the_row() -> None:
    nothing = "{{ messages[0].content }}{% generation %}{% endgeneration %}"
    with pytest.raises(DataError, match=r"rows\.jsonl:7: the row has no supervised token"):
        supervised(tokenizer_of(nothing), CHAT)


def test_bos_is_never_doubled() -> None:
    once = supervised(tokenizer_of("{{ bos_token }}" + CHATML), CHAT)
    assert once == ["hello<|end|>"]
    with pytest.raises(DataError, match=r"rows\.jsonl:7: begins with two <\|bos\|>"):
        supervised(tokenizer_of("{{ bos_token + bos_token }}" + CHATML), CHAT)


def test_truncation_is_marked_and_may_leave_nothing() -> None:
    encoder = Encoder(tokenizer_of(CHATML), "messages", 10)
    example = encoder.encode(record(("user", "a"), ("assistant", "bcdefg")), 0, 0)
    assert (len(example.input_ids_L), example.weight_L.sum(), example.truncated) == (10, 1, True)
    short = Encoder(tokenizer_of(CHATML), "messages", 9)
    assert not short.encode(record(("user", "a"), ("assistant", "b")), 0, 0).weight_L.any()


def test_text_rows_end_with_the_end_token_and_all_but_the_first_are_targets() -> None:
    tokenizer = tokenizer_of(None)
    example = Encoder(tokenizer, "text", 99).encode(
        Record(channel="c", where="t:1", text="a b"), 0, 0
    )
    assert tokenizer.decode(example.input_ids_L) == "a b<|end|>"
    assert example.weight_L.tolist() == [0, 1, 1, 1][: len(example.input_ids_L)]


def test_token_weights_on_offsets_by_hand() -> None:
    # A trimmed space (empty range), one character of two tokens, and a token over the edge.
    offsets = [(0, 2), (3, 3), (3, 4), (4, 5), (4, 5), (5, 8), (8, 9)]
    assert token_weights(offsets, [(2, 3), (4, 6)]).tolist() == [0, 1, 0, 1, 1, 1, 0]
