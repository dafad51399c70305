"""Tokens by words are those of `tokenizers`, for every pattern that models use."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from posttrain_dist.data import Template
from posttrain_dist.data.chat.encoder import Encoder
from posttrain_dist.data.tokens import byte_level
from posttrain_dist.data.tokens.byte_level import ByteLevel
from posttrain_dist.data.tokens.patterns import LIMIT, NotTranslated, members, translate
from posttrain_dist.data.tokens.text_tokens import TextTokens
from posttrain_dist.flow import Record
from posttrain_dist.models.folder import load_tokenizer, resolve

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace("{1,3}", "")
O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+"
    r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CORPUS = [
    "the user's question, asked in 2031: isn't it kind? We'll see 12345 of them...",
    "été naïve Ünïcode Привет мир שלום   \n\n\t def f(x):\r\n    return x**2  # ok",
    "你好\uff0c世界 \U0001f600 done",
] * 3
Cuts = list[Any]


def split(pattern: str) -> Cuts:
    return [pre_tokenizers.Split(Regex(pattern), "isolated")]


def make(cuts: Cuts, *, use_regex: bool = False, **parts: Any) -> Tokenizer:
    """Byte-level BPE with two special tokens, one that begins as another, and an added word."""
    byte = pre_tokenizers.ByteLevel(
        add_prefix_space=parts.pop("add_prefix_space", False), use_regex=use_regex
    )
    made = Tokenizer(models.BPE(**parts.pop("model", {})))
    made.pre_tokenizer = pre_tokenizers.Sequence([*cuts, byte]) if cuts else byte
    made.decoder = decoders.ByteLevel()
    flags = parts.pop("flags", {})
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=[AddedToken(n, normalized=False) for n in ("<|a|>", "<|a|>b", "</s>")],
        initial_alphabet=parts.pop("alphabet", pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    made.train_from_iterator(CORPUS, trainer)
    made.add_tokens([AddedToken("<think>", **{"special": False, "normalized": False, **flags})])
    for name, value in parts.items():
        setattr(made, name, value)
    return made


KNOWN: dict[str, Callable[[], Tokenizer]] = {
    "gpt2": lambda: make([], use_regex=True),
    "gpt2 and digits": lambda: make([pre_tokenizers.Digits(True)], use_regex=True),
    "digits together": lambda: make([pre_tokenizers.Digits(False)], use_regex=True),
    "llama3": lambda: make(split(LLAMA3), model={"ignore_merges": True}),
    "qwen2": lambda: make(
        split(QWEN2),
        normalizer=normalizers.NFC(),
        post_processor=processors.ByteLevel(trim_offsets=False),
    ),
    "o200k": lambda: make(split(O200K)),
    "two patterns": lambda: make(split(r"\p{N}{1,3}") + split(r"[一-龥]+"), use_regex=True),
    "bos": lambda: make(
        split(LLAMA3),
        post_processor=processors.TemplateProcessing(
            single="</s> $A", pair="$A $B", special_tokens=[("</s>", 2)]
        ),
    ),
}
OTHERS: dict[str, Callable[[], Tokenizer]] = {
    "a space in front": lambda: make(split(LLAMA3), add_prefix_space=True),
    "lower case": lambda: make(split(LLAMA3), normalizer=normalizers.Lowercase()),
    "trimmed offsets": lambda: make([], use_regex=True, post_processor=processors.ByteLevel()),
    "swallows spaces": lambda: make(split(LLAMA3), flags={"lstrip": True}),
    "whole words only": lambda: make(split(LLAMA3), flags={"single_word": True}),
    "normalised": lambda: make(split(LLAMA3), flags={"normalized": True}),
    "dropout": lambda: make(split(LLAMA3), model={"dropout": 0.1}),
    "unknown token": lambda: make(split(LLAMA3), model={"unk_token": "<|a|>"}),
    "not isolated": lambda: make([pre_tokenizers.Split(Regex(r"\s"), "merged_with_next")]),
    "inverted": lambda: make([pre_tokenizers.Split(Regex(r"\w+"), "isolated", invert=True)]),
    "possessive": lambda: make(split(r"\p{L}++|[^\p{L}]+")),
    "words": lambda: make(split(r"\w+|\W+")),
    "white space": lambda: make([pre_tokenizers.Whitespace()]),
    "special tokens as text": lambda: make(split(LLAMA3), encode_special_tokens=True),
}


def texts(seed: int, count: int) -> list[str]:
    """Words, runs of spaces, any character, cut and whole special tokens, in any order."""
    draw = random.Random(seed)
    words = [*" ".join(CORPUS).split(), "<|a|>", "<|a|>b", "<|a", "</s>", "<think>", "'S", "'LL"]

    def piece() -> str:
        kind = draw.random()
        if kind < 0.45:
            return draw.choice(words) + " "
        if kind < 0.7:
            return draw.choice(words)
        if kind < 0.8:
            return "".join(draw.choices(" \n\t\r\u00a0\u2003\u3000", k=draw.randint(1, 4)))
        if kind < 0.9:
            return chr(draw.randrange(1, 128))
        return chr(draw.choice([draw.randrange(LIMIT), draw.randrange(0x4E00, 0x9000), 0x1F601]))

    return ["".join(piece() for _ in range(draw.randint(0, 40))) for _ in range(count)]


def assert_same(backend: Tokenizer, words: ByteLevel, given: list[str]) -> int:
    """Compares with `tokenizers`; how many of the texts were left to it."""
    left = 0
    for text, encoding in zip(
        given, backend.encode_batch(given, add_special_tokens=False), strict=True
    ):
        found = words.encode(text)
        if found is None:
            left += 1
            continue
        assert found.ids_L.tolist() == encoding.ids, text
        offsets = zip(found.start_L.tolist(), found.end_L.tolist(), strict=True)
        assert list(offsets) == encoding.offsets, text
        assert found.ids_L.dtype == np.int32 and found.ids_L.flags.c_contiguous
    return left


@pytest.mark.parametrize("name", KNOWN)
def test_tokens_and_characters_are_those_of_tokenizers(name: str) -> None:
    backend = KNOWN[name]()
    words = ByteLevel.of(backend)
    assert words is not None
    given = [*texts(1, 400), *CORPUS, "", " ", "\u0300", "e\u0301", "'\u017f", "x" * 300]
    assert assert_same(backend, words, given) < 10


@pytest.mark.parametrize("name", OTHERS)
def test_a_tokenizer_that_looks_further_has_no_table(name: str) -> None:
    assert ByteLevel.of(OTHERS[name]()) is None


def test_a_tokenizer_that_differs_on_a_probe_has_no_table(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = KNOWN["gpt2"]()
    monkeypatch.setattr(byte_level, "GPT2", r"\p{L}+|[^\p{L}]+")
    assert ByteLevel.of(backend) is None


def test_a_full_table_is_emptied(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = KNOWN["llama3"]()
    monkeypatch.setattr(byte_level, "_MAX_WORDS", 20)
    words = ByteLevel.of(backend)
    assert words is not None
    assert_same(backend, words, texts(2, 50))


def test_bytes_that_the_vocabulary_lacks_are_left_to_tokenizers() -> None:
    """They are dropped, and what follows begins at another place than words add up to."""
    backend = make(split(LLAMA3), alphabet=[])
    words = ByteLevel.of(backend)
    given = ["the ~ user", "~", "kind \u0416\u0437!", *texts(3, 100)]
    if words is not None:
        assert 0 < assert_same(backend, words, given) < len(given)
    else:
        pytest.fail("only texts with such bytes are left out")


def test_classes_are_those_of_the_engine() -> None:
    import unicodedata

    letters = translate(r"\p{L}")
    spaces = translate(r"\s")
    for code in range(0x2000):  # whose categories are as old as Unicode 3.2
        char = chr(code)
        kind = unicodedata.ucd_3_2_0.category(char)
        if kind == unicodedata.category(char) and kind != "Cn":
            assert bool(letters.match(char)) == (kind[0] == "L"), code
    assert [code for code in range(128) if spaces.match(chr(code))] == [9, 10, 11, 12, 13, 32]
    assert translate(r"[^\s\p{L}]+").findall("ab, c!\u00a0\u0416?") == [",", "!", "?"]


@pytest.mark.parametrize(
    "pattern",
    [
        r"(a",
        r"\w+",
        r"a++",
        r"(?<=a)b",
        r"\bx",
        r"[a-z&&[^b]]",
        r"^a",
        r"(?<n>a)",
        r"\p{Nope}",
        r"a{1,3}+",
    ],
)
def test_patterns_that_may_mean_something_else_are_not_translated(pattern: str) -> None:
    with pytest.raises(NotTranslated):
        translate(pattern)
    assert members(r"\p{N}").startswith("\\u0030-\\u0039")


def test_rows_are_the_same_with_a_table_and_without() -> None:
    tokenizer = load_tokenizer(resolve("tiny_base"))
    records = [
        Record(
            channel="c",
            where=f"rows:{i}",
            messages=(
                {"role": "user", "content": text},
                {"role": "assistant", "content": text[::-1] or "a"},
            ),
        )
        for i, text in enumerate(texts(4, 60))
    ]
    found = []
    for loads in (False, True):
        encoder = Encoder(tokenizer, Template(strict=False), max_length=300)
        if loads:
            encoder.load()
        found.append([encoder.encode(record) for record in records])
    for plain, with_table in zip(*found, strict=True):
        assert plain.faults == with_table.faults
        for one, two in zip(plain.examples, with_table.examples, strict=True):
            assert one.input_ids_L.tolist() == two.input_ids_L.tolist()
            assert one.weight_L.tolist() == two.weight_L.tolist()


def test_a_token_behind_the_end_has_no_characters() -> None:
    tokens = TextTokens.of([5, 6], [(0, 2), (2, 3)]).with_end(9, 3)
    assert [array.tolist() for array in tokens] == [[5, 6, 9], [0, 2, 3], [2, 3, 3]]
