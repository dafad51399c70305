"""Record -> Example: which tokens are targets. Nothing later changes a mask."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from posttrain_dist.data.template import ChatTemplate, Span
from posttrain_dist.errors import DataError
from posttrain_dist.flow import Example, Record


class Encoder:
    """Turns records into examples with one tokenizer."""

    def __init__(self, tokenizer: Any, rows: str, max_length: int) -> None:
        self._tokenizer = tokenizer
        self._template = ChatTemplate(tokenizer) if rows == "messages" else None
        self._max_length = max_length

    def encode(self, record: Record, channel: int, sample_id: int) -> Example:
        """Tokens and target weights of one row, cut to `max_length` tokens.

        A row that was cut may be left without any supervised token; the caller decides.

        Raises:
            DataError: nothing in the whole row is supervised, or it begins with two BOS tokens.
            ModelError: the chat template cannot be masked.
        """
        if self._template is None:
            ids_L, weight_L = self._encode_text(record)
        else:
            ids_L, weight_L = self._encode_messages(record, self._template)
        weight_L[0] = 0  # nothing stands before the first token to predict it from
        bos = self._tokenizer.bos_token_id
        if bos is not None and len(ids_L) > 1 and ids_L[0] == ids_L[1] == bos:
            raise DataError(
                f"begins with two {self._tokenizer.bos_token} tokens",
                where=record.where,
                fix="remove the one in the row, or one of those that the chat template writes",
            )
        if not weight_L.any():
            raise DataError(
                "the row has no supervised token",
                where=record.where,
                fix="give the assistant something to say; if every row says this, the chat "
                "template's {% generation %} marks are misplaced",
            )
        return Example(
            input_ids_L=ids_L[: self._max_length],
            weight_L=weight_L[: self._max_length],
            channel=channel,
            sample_id=sample_id,
            truncated=len(ids_L) > self._max_length,
        )

    def _encode_text(self, record: Record) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
        ids = list(self._tokenizer(record.text)["input_ids"])
        if not ids or ids[-1] != self._tokenizer.eos_token_id:
            ids.append(self._tokenizer.eos_token_id)
        return np.array(ids, np.int32), np.ones(len(ids), np.float32)

    def _encode_messages(
        self, record: Record, template: ChatTemplate
    ) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
        text, spans = template.spans(record.messages, record.where)
        # The template has written BOS and all other special tokens itself.
        encoded = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        weight_L = token_weights(encoded["offset_mapping"], spans)
        if not len(weight_L):
            raise DataError(
                "the chat template renders nothing", where=record.where, fix="mend the template"
            )
        return np.array(encoded["input_ids"], np.int32), weight_L


def token_weights(offsets: Sequence[Span], spans: Sequence[Span]) -> npt.NDArray[np.float32]:
    """1 for every token that covers a character of a span, else 0.

    Tokenizers that trim offsets give a token of spaces an empty range: such a token covers what
    lies between the token before and its own end.
    """
    weight_L = np.zeros(len(offsets), np.float32)
    previous_end, first = 0, 0
    for i, (token_start, token_end) in enumerate(offsets):
        start = token_start if token_start < token_end else previous_end
        previous_end = max(previous_end, token_end)
        while first < len(spans) and spans[first][1] <= start:
            first += 1
        if first < len(spans) and max(start, spans[first][0]) < token_end:
            weight_L[i] = 1
    return weight_L
