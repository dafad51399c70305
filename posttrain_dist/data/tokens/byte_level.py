"""Byte-level BPE (GPT-2, Llama 3, Qwen), word by word: each word is tokenised once.

`tokenizers` cuts a text at its added tokens, cuts what is between them into words by a pattern, and
gives each word to the BPE model, which sees nothing of its neighbours:

    text -> added tokens and what is between -> words -> tokens of each word

So the tokens of a text are those of its words, one behind the other, and those of a word are
always the same. Here the pattern is run by `re`, and the tokens of a word come from a table that
the model of `tokenizers` itself fills: three times as fast, as most of its time goes into keeping
track of characters. A tokenizer with anything else in it (another normaliser, spaces put in front,
added tokens that swallow spaces) has no such table; nor has one that differs from `tokenizers` on
the probes below.
"""

from __future__ import annotations

import json
import random
import re
import unicodedata
from array import array
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from posttrain_dist.data.tokens.patterns import (
    GPT2,
    LIMIT,
    UNKNOWN,
    NotTranslated,
    digit_pattern,
    translate,
)
from posttrain_dist.data.tokens.text_tokens import TextTokens

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_MAX_WORDS = 1 << 17  # in the table, which is then emptied: about 30 MB
_MAX_WORD = 64  # characters; longer ones hardly come again
_NUM_PROBES = 120
_WORDS = (
    *(
        "the",
        "user's",
        "I'LL",
        "don't",
        "we've",
        " x",
        "  y",
        "1234567",
        "3.14",
        "a_b",
        "\n\n",
        "\n",
    ),
    *(" \n ", "\t", "\r\n", "...", "!?", "\u2019s", "\u00e9t\u00e9", "\u0416", "\u00a0", "\u2003"),
    *("\u00b2", "\u0661", "e\u0301", "\u4f60\u597d", "\U0001f600", "()", "{}", "'", " '", "\u3000"),
)


class _Unusable(ValueError):
    """A word of which the model leaves out a part."""


class _WordTable(dict[str, bytes]):
    """Word -> its tokens: int32 [tokens, (id, characters on from the last end, characters)]."""

    def __init__(self, backend: Tokenizer, added: dict[str, int]) -> None:
        super().__init__()
        self._model, self._added = backend.model, added

    def __missing__(self, word: str) -> bytes:
        found = self._tokenise(word)
        if len(word) <= _MAX_WORD:
            if len(self) >= _MAX_WORDS:
                self.clear()
            self[word] = found
        return found

    def _tokenise(self, word: str) -> bytes:
        """The row of each token."""
        if word in self._added:
            return array("i", (self._added[word], len(word), len(word))).tobytes()
        if not word.isascii():
            return self._tokenise_bytes(word)
        found, covered = array("i"), 0
        for token in self._model.tokenize(word.translate(_LETTERS)):
            size = len(token.value)  # a letter for each byte, which is a character
            found.extend((token.id, size, size))
            covered += size
        if covered != len(word):
            raise _Unusable(word)
        return found.tobytes()

    def _tokenise_bytes(self, word: str) -> bytes:
        """The same where characters have several bytes: one may be that of several tokens."""
        character = [i for i, char in enumerate(word) for _ in char.encode()]  # of each byte
        found, byte, last = array("i"), 0, 0
        for token in self._model.tokenize("".join(_LETTERS[byte] for byte in word.encode())):
            first, byte = character[byte], byte + len(token.value)
            if byte > len(character):
                raise _Unusable(word)
            behind = character[byte - 1] + 1
            found.extend((token.id, behind - last, behind - first))
            last = behind
        if byte != len(character):
            raise _Unusable(word)
        return found.tobytes()


class ByteLevel:
    """A tokenizer's tokens by words; made by `of`."""

    def __init__(self, backend: Tokenizer, cuts: list[re.Pattern[str]], is_nfc: bool) -> None:
        self._backend, self._cuts, self._is_nfc = backend, cuts, is_nfc
        added = {t.content: i for i, t in backend.get_added_tokens_decoder().items()}
        longest = sorted(added, key=lambda name: (-len(name), name))
        self._added = frozenset(added)
        self._borders = re.compile("(" + ("|".join(map(re.escape, longest)) or "(?!)") + ")")
        self._tokens_of = _WordTable(backend, added).__getitem__

    @classmethod
    def of(cls, backend: Tokenizer) -> ByteLevel | None:
        """Null where words of this tokenizer cannot be tokenised by themselves."""
        try:
            if not _is_byte_level(backend):
                return None
            cuts = list(_cuts(_steps(backend.pre_tokenizer, "pretokenizers")))
            made = cls(backend, cuts, is_nfc=backend.normalizer is not None)
        except NotTranslated:
            return None
        return made if made._is_proved() else None

    def encode(self, text: str) -> TextTokens | None:
        """As `encode(text, add_special_tokens=False)`; null: that is to be asked."""
        is_ascii, parts = text.isascii(), list[bytes]()
        try:
            for between in self._borders.split(text):
                if between in self._added:
                    parts.append(self._tokens_of(between))
                elif is_ascii or self._is_known(between):
                    parts.extend(map(self._tokens_of, self._cut(between)))
                else:
                    parts.append(self._ask(between))
        except _Unusable:
            return None
        table = np.frombuffer(b"".join(parts), np.int32).reshape(-1, 3)
        end_L = table[:, 1].cumsum(dtype=np.int32)
        return TextTokens(np.ascontiguousarray(table[:, 0]), end_L - table[:, 2], end_L)

    def _cut(self, text: str) -> list[str]:
        """The words of what stands between two added tokens."""
        words = [text] if text else []
        for cut in self._cuts:
            pieces, words = words, []
            for piece in pieces:
                words += cut.findall(piece) if len(piece) > 1 else piece
            if sum(map(len, words)) != len(text):  # what lies between two finds is a word too
                between = re.compile(f"({cut.pattern})")
                words = [word for piece in pieces for word in between.split(piece) if word]
        return words

    def _is_known(self, text: str) -> bool:
        is_normal = not self._is_nfc or unicodedata.is_normalized("NFC", text)
        return is_normal and not UNKNOWN.search(text)

    def _ask(self, text: str) -> bytes:
        """Tokens of what stands between two added tokens, by `tokenizers`."""
        encoding = self._backend.encode(text, add_special_tokens=False)
        tokens = TextTokens.of_encoding(encoding)
        size_L = tokens.end_L - tokens.start_L
        step_L = np.diff(tokens.end_L, prepend=0)
        if len(step_L):  # what follows begins behind all of the text
            if tokens.end_L[-1] != len(text):
                raise _Unusable(text)
        elif text:
            raise _Unusable(text)
        return np.stack([tokens.ids_L, step_L, size_L], axis=1).astype(np.int32).tobytes()

    def _is_proved(self) -> bool:
        """Whether all probes have the tokens that `tokenizers` gives them."""
        draw = random.Random(0)
        added = sorted(self._added)[:50]
        kinds: list[Callable[[], str]] = [
            lambda: draw.choice(_WORDS),
            lambda: draw.choice(_WORDS),
            lambda: " " * draw.randint(0, 3) + draw.choice(_WORDS),
            lambda: chr(draw.randrange(128)),
            lambda: chr(draw.randrange(LIMIT)),
            lambda: draw.choice(added) if added else "",
        ]
        probes = ["".join(draw.choice(kinds)() for _ in range(20)) for _ in range(_NUM_PROBES)]
        wanted = self._backend.encode_batch(probes, add_special_tokens=False)
        return all(
            (found := self.encode(probe)) is None
            or all(map(np.array_equal, found, TextTokens.of_encoding(encoding)))
            for probe, encoding in zip(probes, wanted, strict=True)
        )


# ------------------------------------------------------------------------ what a tokenizer is


def _is_byte_level(backend: Tokenizer) -> bool:
    """Whether nothing in the tokenizer looks at more than a word, but the cutting of words."""
    model, normalizers = backend.model, _steps(backend.normalizer, "normalizers")
    odd = ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix")
    return (
        type(model).__name__ == "BPE"
        and not any(getattr(model, name) for name in odd)
        and all(step["type"] == "NFC" for step in normalizers)
        and not (backend.truncation or backend.padding or backend.encode_special_tokens)
        and not any(
            token.single_word or token.lstrip or token.rstrip or token.normalized
            for token in backend.get_added_tokens_decoder().values()
        )
        and all(
            step["type"] == "TemplateProcessing"
            or (step["type"] == "ByteLevel" and not step["trim_offsets"])
            for step in _steps(backend.post_processor, "processors")
        )
    )


def _cuts(steps: list[dict[str, Any]]) -> Iterator[re.Pattern[str]]:
    """The patterns of a pre-tokenizer, each to be applied to the pieces of the one before.

    Raises:
        NotTranslated: it does anything else.
    """
    if not steps or steps[-1]["type"] != "ByteLevel" or steps[-1]["add_prefix_space"]:
        raise NotTranslated("the last step is not ByteLevel")
    for step in steps[:-1]:
        if step["type"] == "Digits":
            yield digit_pattern(step["individual_digits"])
        elif step["type"] == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
            yield translate(step["pattern"].get("Regex", ""))
        else:
            raise NotTranslated(step["type"])
    if steps[-1]["use_regex"]:
        yield translate(GPT2)


def _steps(part: Any, name: str) -> list[dict[str, Any]]:
    """What a part of a tokenizer is made of, as tokenizer.json has it."""
    if part is None:
        return []
    described = json.loads(part.__getstate__())
    return list(described[name]) if described["type"] == "Sequence" else [described]


def _letters() -> dict[int, str]:
    """Byte -> the character that stands for it, as GPT-2's `bytes_to_unicode`."""
    plain = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    letters = {byte: chr(byte) for byte in plain}
    return letters | {byte: chr(256 + i) for i, byte in enumerate(others)}


_LETTERS = _letters()
