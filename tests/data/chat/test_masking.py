"""Masks against ones written by hand, and one derivation against the other."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from posttrain_dist.data import Form, LongRows, Supervise, Template
from posttrain_dist.data.chat.conversation import Conversation
from posttrain_dist.data.chat.encoder import Encoder
from posttrain_dist.data.chat.rendering.chat_template import ChatTemplate
from posttrain_dist.data.chat.token_weights import token_weights
from posttrain_dist.data.chat.turn_spans import turn_spans
from posttrain_dist.data.tokens.text_tokens import TextTokens
from posttrain_dist.errors import ConfigError, DataError, ModelError
from posttrain_dist.flow import Answer, Record

one = runpy.run_path(str(Path(__file__).with_name("supervised_text.py")))["one"]

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

TokenizerOf = Callable[..., Any]


def record(*turns: tuple[str, str]) -> Record:
    messages = tuple({"role": role, "content": content} for role, content in turns)
    return Record(channel="c", where="rows.jsonl:7", messages=messages)


CHAT = record(("system", "be kind"), ("user", "hi"), ("assistant", "hello"), ("user", "?"))
TWO = record(*[(m["role"], m["content"]) for m in CHAT.messages], ("assistant", " \n🙂"))


def encode(tokenizer: Any, row: Record, max_length: int = 999, **choice: Any) -> Any:
    return one(
        Encoder(
            tokenizer, Template(**{"form": Form.conversation, **choice}), max_length=max_length
        ).encode(row)
    )


def runs(tokenizer: Any, encoded: Any) -> list[str]:
    """Runs of tokens of one weight above 0, as text."""
    found: list[tuple[float, list[int]]] = []
    previous = 0.0
    for token, weight in zip(encoded.input_ids_L, encoded.weight_L, strict=True):
        if weight:
            if weight != previous:
                found.append((weight, []))
            found[-1][1].append(int(token))
        previous = weight
    return [tokenizer.decode(run) for _, run in found]


def supervised(tokenizer: Any, row: Record, **choice: Any) -> list[str]:
    return runs(tokenizer, encode(tokenizer, row, **choice))


# ------------------------------------------------------------------------------- the mask


@pytest.mark.parametrize("template", [CHATML, MARKED, NARROW])
@pytest.mark.parametrize("trim_offsets", [False, True])
def test_mask_by_hand(tokenizer_of: TokenizerOf, template: str, trim_offsets: bool) -> None:
    tokenizer = tokenizer_of(template, trim_offsets=trim_offsets)
    # Spaces and the last byte of the emoji included; no header, no line break behind the end.
    # Not strict: the line break of the prompt may merge with that of the answer.
    assert supervised(tokenizer, TWO, strict=False) == ["hello<|end|>", " \n🙂<|end|>"]
    assert supervised(tokenizer, CHAT) == ["hello<|end|>"]


def test_mask_token_by_token(tokenizer_of: TokenizerOf) -> None:
    tokenizer = tokenizer_of(CHATML)
    example = encode(tokenizer, record(("user", "a"), ("assistant", "b")))
    tokens = [tokenizer.decode([token]) for token in example.input_ids_L]
    golden = ["<|start|>", "user", "\n", "a", "<|end|>", "\n"]
    golden += ["<|start|>", "assistant", "\n", "b", "<|end|>", "\n"]
    assert tokens == golden
    assert example.weight_L.tolist() == [0] * 9 + [1, 1, 0]
    assert (example.truncated, example.faults) == (False, ())


@pytest.mark.parametrize("template", [MARKED, NARROW])
@pytest.mark.parametrize("row", [CHAT, TWO, record(("user", "x"), ("assistant", ""))])
def test_marks_and_prefixes_agree(tokenizer_of: TokenizerOf, template: str, row: Record) -> None:
    chat = ChatTemplate(tokenizer_of(template))
    marked = Conversation(chat, row.messages, "w")
    by_prefix = Conversation(chat, row.messages, "w", by_marks=False)
    assert turn_spans(marked) == turn_spans(by_prefix)
    assert marked.text == by_prefix.text


def test_marks_agree_with_transformers(tokenizer_of: TokenizerOf) -> None:
    tokenizer = tokenizer_of(MARKED)
    theirs = tokenizer.apply_chat_template(
        list(CHAT.messages), return_dict=True, return_assistant_tokens_mask=True
    )
    ours = encode(tokenizer, CHAT)
    assert ours.input_ids_L.tolist() == theirs["input_ids"]
    assert ours.weight_L.tolist() == theirs["assistant_masks"]


def test_a_turn_marked_in_two_places_and_one_not_marked(tokenizer_of: TokenizerOf) -> None:
    # The first stretch of each turn and its end are marked; a turn that says "skip" is not.
    template = MARKED.replace(
        "{% generation %}{{ m.content + '<|end|>' }}{% endgeneration %}",
        "{% if m.content == 'skip' %}{{ 'skip<|end|>' }}{% else %}"
        "{% generation %}{{ m.content[:1] }}{% endgeneration %}{{ m.content[1:] }}"
        "{% generation %}{{ '<|end|>' }}{% endgeneration %}{% endif %}",
    )
    row = record(("user", "x"), ("assistant", "skip"), ("user", "y"), ("assistant", "abc"))
    tokenizer = tokenizer_of(template)
    assert supervised(tokenizer, row, strict=False) == ["a", "<|end|>"]
    with pytest.raises(
        DataError, match=r"rows\.jsonl:7: .*does not mark 'bc' inside of messages\[3\]"
    ):
        supervised(tokenizer, row, supervise=Supervise.last_turn)
    weighed = encode(tokenizer, replace(row, weights=(None, 9.0, None, 0.5)), strict=False)
    assert weighed.faults == ("generation_marks",)
    assert set(weighed.weight_L.tolist()) == {0.0, 0.5}


def test_next_header_is_not_taken_for_the_end_of_a_turn(tokenizer_of: TokenizerOf) -> None:
    said = supervised(tokenizer_of(NO_END), TWO, strict=False)
    assert said == ["hello", " \n🙂"]


def test_template_whose_prefixes_do_not_nest_is_refused(tokenizer_of: TokenizerOf) -> None:
    tokenizer = tokenizer_of(SHIFTING)
    with pytest.raises(DataError, match=r"(?s)rows\.jsonl:7.*messages\[2\].*\{% generation %\}"):
        supervised(tokenizer, TWO)
    single = record(("user", "x"), ("assistant", "y"))
    assert supervised(tokenizer, single) == ["y<|end|>"]


def test_template_that_refuses_a_row_names_the_row(tokenizer_of: TokenizerOf) -> None:
    strict = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(DataError, match=r"rows\.jsonl:7.*roles must alternate"):
        supervised(tokenizer_of(strict), CHAT)
    with pytest.raises(ModelError, match="not valid Jinja"):
        supervised(tokenizer_of("{% for %}"), CHAT)


def test_token_weights_on_offsets_by_hand() -> None:
    # A trimmed space (empty range), one character of two tokens, and a token over the edge.
    offsets = [(0, 2), (3, 3), (3, 4), (4, 5), (4, 5), (5, 8), (8, 9)]
    tokens = TextTokens.of(list(range(len(offsets))), offsets)
    assert token_weights(tokens, [(2, 3), (4, 6)]).tolist() == [0, 1, 0, 1, 1, 1, 0]
    assert token_weights(tokens, [(2, 3, 0.5), (4, 6, 2.0)]).tolist() == [0, 0.5, 0, 2, 2, 2, 0]


# ------------------------------------------------------------------------------- policies


FOUR = record(
    ("system", "be kind"),
    ("user", "the question"),
    ("assistant", "hello"),
    ("tool", "42"),
    ("assistant", "it says"),
)


@pytest.mark.parametrize("template", [CHATML, MARKED, NARROW])
@pytest.mark.parametrize(
    ("supervise", "golden"),
    [
        (Supervise.assistant, ["hello<|end|>", "it says<|end|>"]),
        (Supervise.last_turn, ["it says<|end|>"]),
        (
            Supervise.all,
            ["be kind<|end|>", "the question<|end|>", "hello<|end|>", "it says<|end|>"],
        ),
    ],
)
def test_policies(
    tokenizer_of: TokenizerOf, template: str, supervise: Supervise, golden: list[str]
) -> None:
    assert supervised(tokenizer_of(template), FOUR, supervise=supervise) == golden


def test_all_is_refused_where_a_template_changes_what_is_said(tokenizer_of: TokenizerOf) -> None:
    loud = CHATML.replace("m.content +", "(m.content | upper) +")
    # Capitals do not move the signs, so the place is still proved.
    said = supervised(tokenizer_of(loud), FOUR, supervise=Supervise.all, strict=False)
    assert said[0] == "BE KIND<|end|>"
    twice = CHATML.replace("m.content +", "m.content + m.content +")
    with pytest.raises(DataError, match=r"rows\.jsonl:7.*messages\[0\]\.content.*be proved"):
        supervised(tokenizer_of(twice), FOUR, supervise=Supervise.all)


def test_weights_of_messages(tokenizer_of: TokenizerOf) -> None:
    tokenizer = tokenizer_of(MARKED)
    row = replace(FOUR, weights=(None, 0.5, 0.0, None, 2.0))
    encoded = encode(tokenizer, row)
    assert runs(tokenizer, encoded) == ["the question<|end|>", "it says<|end|>"]
    found = {float(weight) for weight in encoded.weight_L}
    assert found == {0.0, 0.5, 2.0}
    # A number beats the policy, null is the policy.
    only = replace(FOUR, weights=(None, None, 3.0, None, None))
    assert supervised(tokenizer, only, supervise=Supervise.last_turn) == [
        "hello<|end|>",
        "it says<|end|>",
    ]


def test_results_of_tools_are_never_learned(tokenizer_of: TokenizerOf) -> None:
    row = replace(FOUR, weights=(None, None, None, 1.0, None))
    with pytest.raises(DataError, match=r"rows\.jsonl:7: messages\[3\] is the result of a tool"):
        encode(tokenizer_of(MARKED), row)


def test_one_sample_for_each_turn(tokenizer_of: TokenizerOf) -> None:
    tokenizer = tokenizer_of(SHIFTING)
    encoder = Encoder(tokenizer, Template(form=Form.turns), max_length=999)
    samples, _, _ = encoder.encode(record(*[(m["role"], m["content"]) for m in FOUR.messages]))
    assert [runs(tokenizer, sample) for sample in samples] == [
        ["hello<|end|>"],
        ["it says<|end|>"],
    ]
    second = tokenizer.decode(samples[1].input_ids_L)
    assert "assistant\nhello<|end|>" in second  # the earlier turn as inference shows it
    with pytest.raises(ConfigError, match=r"template\.form"):
        Encoder(tokenizer, Template(form=Form.turns, supervise=Supervise.all), max_length=9)


# ------------------------------------------------------------------------------- long rows


LONG = record(("user", "abcdefgh"), ("assistant", "ijklmnopqr"))  # 3 + 8 + 2 + 3 + 10 + 2 tokens


def test_truncation_is_marked_and_may_leave_nothing(tokenizer_of: TokenizerOf) -> None:
    tokenizer = tokenizer_of(CHATML)
    whole = encode(tokenizer, LONG)
    first = int(whole.weight_L.argmax())
    cut = encode(tokenizer, LONG, max_length=first + 1)
    assert (cut.weight_L.sum(), cut.truncated, cut.faults) == (1, True, ("end_of_turn",))
    assert cut.input_ids_L.tolist() == whole.input_ids_L[: first + 1].tolist()
    none = encode(tokenizer, LONG, max_length=first)
    assert (none.weight_L.sum(), none.truncated, none.faults) == (0, True, ("truncated_target",))
    # Only the line break behind the end token is lost.
    almost = encode(tokenizer, LONG, max_length=len(whole.input_ids_L) - 1)
    assert (almost.truncated, almost.faults) == (True, ())


def test_long_rows_are_dropped(tokenizer_of: TokenizerOf) -> None:
    tokenizer = tokenizer_of(CHATML)
    length = len(encode(tokenizer, LONG).input_ids_L)
    for limit, kept in ((length, 1), (length - 1, 0)):
        encoder = Encoder(
            tokenizer, Template(form=Form.conversation), max_length=limit, long_rows=LongRows.drop
        )
        assert len(encoder.encode(LONG).examples) == kept


@pytest.mark.parametrize("limit", [5, 6, 7, 13])
def test_split_rows_keep_every_target_once(tokenizer_of: TokenizerOf, limit: int) -> None:
    tokenizer = tokenizer_of(CHATML)
    whole = encode(tokenizer, LONG)
    encoder = Encoder(
        tokenizer, Template(form=Form.conversation), max_length=limit, long_rows=LongRows.split
    )
    pieces, _, _ = encoder.encode(LONG)
    assert max(len(piece.input_ids_L) for piece in pieces) <= limit
    for piece in pieces:
        assert piece.weight_L[0] == 0
        assert not piece.truncated
    # What is predicted, with the token before it.
    wanted = [
        (int(whole.input_ids_L[i - 1]), int(whole.input_ids_L[i]))
        for i in whole.weight_L.nonzero()[0]
    ]
    found = [
        (int(piece.input_ids_L[i - 1]), int(piece.input_ids_L[i]))
        for piece in pieces
        for i in piece.weight_L.nonzero()[0]
    ]
    assert found == wanted


# ------------------------------------------------------------------------------- other rows


def text_row(text: str, supervised_from: int = 0) -> Record:
    return Record(channel="c", where="t:1", text=text, supervised_from=supervised_from)


def test_text_rows_end_with_the_end_token_and_all_but_the_first_are_targets(
    tokenizer_of: TokenizerOf,
) -> None:
    tokenizer = tokenizer_of(None)
    example = encode(tokenizer, text_row("a b"))
    assert [tokenizer.decode([token]) for token in example.input_ids_L] == [
        "a",
        " ",
        "b",
        "<|end|>",
    ]
    assert example.weight_L.tolist() == [0, 1, 1, 1]
    ended = encode(tokenizer, text_row("a b<|end|>"))
    assert ended.input_ids_L.tolist() == example.input_ids_L.tolist()


def test_completion_is_learned_and_its_prompt_is_not(tokenizer_of: TokenizerOf) -> None:
    tokenizer = tokenizer_of(None)
    assert runs(tokenizer, encode(tokenizer, text_row("x = y", 3))) == [" y<|end|>"]
    assert len(tokenizer(" the")["input_ids"]) == 1
    merged = text_row("x the", 3)
    with pytest.raises(DataError, match=r"(?s)t:1: .*merge with the prompt's last.*spaces"):
        encode(tokenizer, merged)
    reported = encode(tokenizer, merged, strict=False)
    assert reported.faults == ("prompt_prefix",)


def test_rows_of_tokens_are_taken_as_they_are(tokenizer_of: TokenizerOf) -> None:
    row = Record(channel="c", where="t:1", input_ids=(5, 6, 7, 8), labels=(5, -100, 7, -100))
    encoded = encode(tokenizer_of(None), row)
    assert encoded.input_ids_L.tolist() == [5, 6, 7, 8]
    assert encoded.weight_L.tolist() == [0, 0, 1, 0]  # the first has nothing before it
    bare = encode(tokenizer_of(None), replace(row, labels=()))
    assert bare.weight_L.tolist() == [0, 1, 1, 1]


def test_rows_of_other_objectives_are_refused(tokenizer_of: TokenizerOf) -> None:
    tokenizer = tokenizer_of(MARKED)
    answer = ({"role": "assistant", "content": "x"},)
    with pytest.raises(DataError, match=r"rows\.jsonl:7: is a preference row"):
        encode(tokenizer, replace(CHAT, answers=(Answer(answer, 1.0), Answer(answer, 0.0))))
    with pytest.raises(DataError, match=r"rows\.jsonl:7: holds a prompt and no answer"):
        encode(tokenizer, record(("user", "?")))
    with pytest.raises(DataError, match=r"holds a prompt and no answer"):
        encode(
            tokenizer,
            replace(record(("user", "?")), reference={"answer": 1}),
            supervise=Supervise.all,
        )


def test_many_rows_give_what_each_gives_alone(tokenizer_of: TokenizerOf) -> None:
    encoder = Encoder(tokenizer_of(MARKED), Template(form=Form.conversation), max_length=999)
    quoted = record(("user", "<|end|>"), ("assistant", "hello"))
    tokens = Record(channel="c", where="t:1", input_ids=(5, 6))
    bad = record(("user", "only"))
    rows = [CHAT, text_row("a b"), bad, quoted, tokens, FOUR]
    many = encoder.encode_many(rows)
    assert isinstance(many[2], DataError)
    for row, result in zip(rows, many, strict=True):
        if row is bad:
            continue
        together, alone = one(result), one(encoder.encode(row))
        assert together.input_ids_L.tolist() == alone.input_ids_L.tolist()
        assert together.weight_L.tolist() == alone.weight_L.tolist()
        assert together.faults == alone.faults
