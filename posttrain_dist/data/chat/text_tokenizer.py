"""The texts of rows -> tokens, in batches; and the tokens of an inference prompt among them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np

from posttrain_dist.data.chat.checks import token_faults
from posttrain_dist.data.chat.controls import Span
from posttrain_dist.data.chat.supervision import SupervisedText
from posttrain_dist.data.tokens.byte_level import ByteLevel
from posttrain_dist.data.tokens.text_tokens import TextTokens

_MANY_TEXTS = 1000  # that are worth the making of a table of words


class TextTokenizer:
    """Tokenises supervised texts with one tokenizer.

    Args:
        tokenizer: a fast tokenizer of transformers.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._backend = tokenizer.backend_tokenizer
        self._backend.no_truncation()  # a tokenizer.json may bring its own limits
        self._backend.no_padding()
        self._eos = tokenizer.eos_token_id
        self._byte_level: ByteLevel | None = None
        self._num_texts, self._is_loaded = 0, False
        self._tails: dict[str, list[int]] = {}

    def load(self) -> None:
        """Make now what is otherwise made when it is worth it."""
        self._byte_level, self._is_loaded = ByteLevel.of(self._backend), True

    def tokenise(self, batch: Sequence[SupervisedText]) -> list[TextTokens | None]:
        """The tokens of each text; nothing where some of its control tokens are forged."""
        self._num_texts += len(batch)
        if self._num_texts > _MANY_TEXTS and not self._is_loaded:
            self.load()
        found: list[TextTokens | None] = [None] * len(batch)
        chats, texts = [], []  # those that `tokenizers` is asked for
        for i, text in enumerate(batch):
            if text.escaped.aliased is not None:
                continue
            if text.is_plain:
                texts.append(i)
            elif self._byte_level is not None:
                found[i] = self._byte_level.encode(text.text)
            if found[i] is None and not text.is_plain:
                chats.append(i)
        # The template has written BOS and all other special tokens of a chat itself.
        for asked, adds_special in ((chats, False), (texts, True)):
            given = [batch[i].text for i in asked]
            encodings = self._backend.encode_batch(given, add_special_tokens=adds_special)
            for i, encoding in zip(asked, encodings, strict=True):
                found[i] = TextTokens.of_encoding(encoding)
        return found

    def prompt_fault(self, text: SupervisedText, tokens: TextTokens, length: int, name: str) -> str:
        """The prompt's text begins the training text; do its tokens?

        No merge crosses a control token. So only what stands from the prompt's last control
        token on has to be tokenised, and that is the same few characters in most rows.
        """
        ids_L = tokens.ids_L
        if text.is_plain:
            tail = self._backend.encode(text.text[:length]).ids
            if tail and tail[-1] == self._eos:
                del tail[-1]
            return token_faults.prompt_token_fault(ids_L, 0, tail, name)
        controls = text.own_controls
        first = int(np.searchsorted(tokens.end_L, length + 1)) - 1
        known = controls.numbers if controls.are_borders else ()
        while first > 0 and int(ids_L[first]) not in known:
            first -= 1
        first = max(first, 0)
        start = int(tokens.start_L[first]) if first else 0
        if text.escaped.aliased is not None:
            part = slice(start, length)
            tail, _ = controls.encode_aliased(text.escaped, part, text.where)
        else:
            tail = self._tail(text.text[start:length])
        return token_faults.prompt_token_fault(ids_L, first, tail, name)

    def behind_prompt(self, text: SupervisedText, tokens: TextTokens) -> TextTokens:
        """Tokens of a turn of which those of its prompt are as the prompt alone has them.

        Where the first characters of the answer merge with the last ones of the prompt, both are
        tokenised apart, as they are at inference: what is said behind the prompt's last control
        token, with which nothing merges.
        """
        ((length, name, _),) = text.prompts
        controls = text.own_controls
        if not self.prompt_fault(text, tokens, length, name):
            return tokens
        written = text.escaped.aliased or text.text
        anchor = controls.last_written(written[:length])
        if not controls.are_borders or not anchor or self._puts_space(anchor):
            return tokens
        prompt_ids, prompt_offsets = self._part(text, slice(0, length))
        said_ids, said_offsets = self._part(text, slice(length, None), anchor)
        moved = length - len(anchor)
        offsets = [(begin + moved, end + moved) for begin, end in said_offsets[1:]]
        if said_ids[0] != controls.ids[anchor] or not offsets or offsets[0][0] != length:
            return tokens
        return TextTokens.of([*prompt_ids, *said_ids[1:]], [*prompt_offsets, *offsets])

    def _puts_space(self, anchor: str) -> bool:
        """Whether a space is put before a text behind a control token, which none has inside."""
        ids = self._backend.encode(anchor + "a", add_special_tokens=False).ids
        return str(self._backend.id_to_token(ids[1])).startswith("▁")

    def _part(
        self, text: SupervisedText, part: slice, anchor: str = ""
    ) -> tuple[list[int], list[Span]]:
        """Tokens of a part of a text, behind a control token where one is named."""
        if text.escaped.aliased is not None:
            return text.own_controls.encode_aliased(text.escaped, part, text.where, anchor)
        encoded = self._backend.encode(anchor + text.text[part], add_special_tokens=False)
        return encoded.ids, encoded.offsets

    def _tail(self, text: str) -> list[int]:
        found = self._tails.get(text)
        if found is None:
            tokens = self._byte_level.encode(text) if self._byte_level else None
            if tokens is not None:
                found = tokens.ids_L.tolist()
            else:
                found = self._backend.encode(text, add_special_tokens=False).ids
            if len(self._tails) < 1000:
                self._tails[text] = found
        return found


def unpadded(text: str, tokens: TextTokens, special: Collection[int]) -> TextTokens:
    """Tokens of which the special ones are without the white space that they swallow."""
    start_L, end_L = tokens.start_L.copy(), tokens.end_L.copy()
    for i in np.flatnonzero(np.isin(tokens.ids_L, list(special))):
        start, whole = int(start_L[i]), text[start_L[i] : end_L[i]]
        start_L[i] = start + len(whole) - len(whole.lstrip())
        end_L[i] = start_L[i] + len(whole.strip())
    return TextTokens(tokens.ids_L, start_L, end_L)
