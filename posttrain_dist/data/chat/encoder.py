"""Record -> tokens and targets. Nothing later changes a mask.

Record -> samples as text with weighted spans -> one call of the tokenizer -> Encoded
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from posttrain_dist.data import LongRows, Policy, Template
from posttrain_dist.data.chat import checks
from posttrain_dist.data.chat.controls import Span
from posttrain_dist.data.chat.supervision import Sample, Supervision, Weighted
from posttrain_dist.data.chat.template import ChatTemplate, load_template
from posttrain_dist.errors import ConfigError, DataError, PosttrainError
from posttrain_dist.flow import Record

if TYPE_CHECKING:
    from tokenizers import Encoding

# What the tokenizer is given at once: its answer takes some hundred bytes a character.
_BATCH = 256  # samples
_BATCH_CHARACTERS = 1 << 20


@dataclass(frozen=True, slots=True)
class Encoded:
    """A sample as tokens. `weight_L[i]` is the weight of token i as a TARGET (0 = masked)."""

    input_ids_L: npt.NDArray[np.int32]
    weight_L: npt.NDArray[np.float32]
    truncated: bool = False  # the row was longer than the limit
    faults: tuple[str, ...] = ()  # checks that failed: names of CHECKS


class Encoder:
    """Turns records into samples with one tokenizer and one template.

    Args:
        tokenizer: a fast tokenizer of transformers.
        template: which one, and what is learned; loaded with the first conversation.
        max_length: tokens a sample at most.
        long_rows: what becomes of longer ones.

    Raises:
        ConfigError: the choices contradict each other.
    """

    def __init__(
        self,
        tokenizer: Any,
        template: Template,
        *,
        max_length: int,
        long_rows: LongRows = LongRows.truncate,
    ) -> None:
        if template.explode_turns and template.policy is Policy.all:
            raise ConfigError(
                "teaches one assistant turn a sample, and template.policy=all teaches the others "
                "too",
                where="template.explode_turns",
                fix="set template.policy=assistant",
            )
        self._tokenizer, self._choice = tokenizer, template
        self._max_length, self._long_rows = max_length, long_rows
        self._backend = tokenizer.backend_tokenizer
        self._backend.no_truncation()  # a tokenizer.json may bring its own limits
        self._backend.no_padding()
        # Kept here: a tokenizer looks them up anew each time.
        self._bos, self._eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        self._bos_name = str(tokenizer.bos_token)
        self._loaded: ChatTemplate | None = None
        self._supervision = Supervision(template, lambda: self.template)
        self._tails: dict[str, list[int]] = {}

    @property
    def template(self) -> ChatTemplate:
        """The chat template.

        Raises:
            ConfigError, ModelError: it cannot be used.
        """
        if self._loaded is None:
            self._loaded = load_template(self._choice, self._tokenizer)
        return self._loaded

    def encode(self, record: Record) -> list[Encoded]:
        """The samples of one row; none where it is left out.

        A row that was cut may be left without any supervised token; the caller decides.

        Raises:
            DataError: the row cannot be used or not be masked, or a check fails and `strict` is
                set.
            ModelError, ConfigError: the chat template cannot be used.
        """
        (result,) = self.encode_many([record])
        if isinstance(result, PosttrainError):
            raise result
        return result

    def encode_many(self, records: Sequence[Record]) -> list[list[Encoded] | PosttrainError]:
        """For each row its samples, or the error that `encode` would raise: faster than one by one.

        Only a DataError is returned; others say that no row can be encoded, and are raised.
        """
        results: list[list[Encoded] | PosttrainError] = []
        batch: list[tuple[int, Sample]] = []
        num_characters = 0
        for i, record in enumerate(records):
            results.append([])
            full = None  # a sample of this row whose prompt fills the limit
            try:
                for sample in self._supervision.samples(record):
                    if full and _begins_alike(sample, full):
                        self._leave_out(sample, results[i])
                        continue
                    batch.append((i, sample))
                    num_characters += len(sample.protected.text)
                    if len(batch) >= _BATCH or num_characters >= _BATCH_CHARACTERS:
                        self._finish_batch(batch, results)
                        full = sample if sample.num_filling else full
                        batch, num_characters = [], 0
                    if isinstance(results[i], PosttrainError):
                        break
            except DataError as error:
                results[i] = error
        self._finish_batch(batch, results)
        return results

    def _finish_batch(
        self, batch: Sequence[tuple[int, Sample]], results: list[list[Encoded] | PosttrainError]
    ) -> None:
        """Tokenise the samples, and put each to the results of its row."""
        for (i, sample), encoding in zip(batch, self._tokenise(batch), strict=True):
            done = results[i]
            if isinstance(done, PosttrainError):
                continue
            try:
                done += self._finish(sample, encoding)
            except DataError as error:
                results[i] = error

    def _leave_out(self, sample: Sample, done: list[Encoded] | PosttrainError) -> None:
        """A sample that is cut as the last one of its row was: before its first target."""
        if self._long_rows is LongRows.truncate and isinstance(done, list):
            faults = tuple(dict.fromkeys([*sample.faults, *done[-1].faults]))
            done.append(replace(done[-1], faults=faults))

    # ---------------------------------------------------------------------------- text -> tokens

    def _tokenise(self, batch: Sequence[tuple[int, Sample]]) -> Iterator[Encoding | None]:
        """What the tokenizer says of each sample; nothing where it is not asked this way."""
        asked = [s for _, s in batch if s.ids is None and s.protected.aliased is None]
        # The template has written BOS and all other special tokens itself.
        chats = [s.protected.text for s in asked if not s.is_text]
        texts = [s.protected.text for s in asked if s.is_text]
        of_chats = iter(self._backend.encode_batch(chats, add_special_tokens=False))
        of_texts = iter(self._backend.encode_batch(texts))
        for _, sample in batch:
            if sample.ids is not None or sample.protected.aliased is not None:
                yield None
            else:
                yield next(of_texts if sample.is_text else of_chats)

    def _finish(self, sample: Sample, encoding: Encoding | None) -> list[Encoded]:
        if encoding is not None:
            ids, offsets = encoding.ids, encoding.offsets
        elif sample.ids is not None:
            ids, offsets = sample.ids, []
        else:
            whole = slice(0, None)
            controls = self.template.controls
            ids, offsets = controls.encode_aliased(sample.protected, whole, sample.where)
        eos = self._eos
        if sample.is_text and (not ids or ids[-1] != eos):
            ids, offsets = [*ids, eos], [*offsets, (len(sample.protected.text),) * 2]
        if not ids:
            raise DataError(
                "the chat template renders nothing", where=sample.where, fix="mend the template"
            )
        # In a row of plain text, special tokens are what they say.
        is_added = not sample.is_text or offsets[0][0] == offsets[0][1]
        own = ids[:2] if sample.is_text else ids
        fault = checks.bos_fault(own, self._bos, eos, self._bos_name) if is_added else ""
        sample.note("double_bos", fault, self._choice.strict)
        if sample.is_text and not fault:
            quoted = checks.quote_fault(ids, self._bos, eos)
            sample.note("control_tokens", quoted, self._choice.strict)
        if sample.weights is None:
            weight_L = self._weigh(sample, ids, offsets)
        else:
            weight_L = sample.weights
        weight_L[0] = 0  # nothing stands before the first token to predict it from
        if not weight_L.any():
            sample.note("no_target", "the row has no supervised token", self._choice.strict)
        if len(ids) > self._max_length and self._choice.explode_turns and sample.prompts:
            sample.num_filling = self._filling(sample, ids, offsets)
        return self._cut(sample, np.array(ids, np.int32), weight_L)

    def _weigh(
        self, sample: Sample, ids: list[int], offsets: list[Span]
    ) -> npt.NDArray[np.float32]:
        if sample.is_text and not sample.prompts:
            return np.ones(len(ids), np.float32)
        if not sample.is_text and self.template.controls.strip_ids:
            offsets = self._unpadded(sample, ids, offsets)
        for length, name, fix in sample.prompts:
            if "prompt_prefix" not in sample.faults:
                fault = self._token_fault(sample, ids, offsets, length, name)
                sample.note("prompt_prefix", fault, self._choice.strict, fix)
        weight_L = token_weights(offsets, sample.spans)
        if sample.is_text:
            weight_L[-1] = 1  # the end token
        return weight_L

    def _unpadded(self, sample: Sample, ids: list[int], offsets: list[Span]) -> list[Span]:
        """Offsets of special tokens without the white space that they swallow."""
        text, swallow = sample.protected.text, self.template.controls.strip_ids
        trimmed = list(offsets)
        for i, (start, end) in enumerate(offsets):
            if ids[i] in swallow:
                start += len(text[start:end]) - len(text[start:end].lstrip())
                trimmed[i] = (start, start + len(text[start:end].strip()))
        return trimmed

    def _token_fault(
        self, sample: Sample, ids: list[int], offsets: list[Span], length: int, name: str
    ) -> str:
        """The prompt's text begins the training text; do its tokens?

        No merge crosses a control token. So only what stands from the prompt's last control
        token on has to be tokenised, and that is the same few characters in most rows.
        """
        text = sample.protected.text
        if sample.is_text:
            tail = self._backend.encode(text[:length]).ids
            if tail and tail[-1] == self._eos:
                del tail[-1]
            return checks.prompt_token_fault(ids, 0, tail, name)
        controls = self.template.controls
        first = bisect_left(offsets, length + 1, key=lambda span: span[1]) - 1
        known = controls.numbers if controls.are_borders else ()
        while first > 0 and ids[first] not in known:
            first -= 1
        first = max(first, 0)
        start = offsets[first][0] if first else 0
        if sample.protected.aliased is not None:
            part = slice(start, length)
            tail, _ = controls.encode_aliased(sample.protected, part, sample.where)
        else:
            tail = self._tail(text[start:length])
        return checks.prompt_token_fault(ids, first, tail, name)

    def _tail(self, text: str) -> list[int]:
        found = self._tails.get(text)
        if found is None:
            found = self._backend.encode(text, add_special_tokens=False).ids
            if len(self._tails) < 1000:
                self._tails[text] = found
        return found

    # -------------------------------------------------------------------------------- the limit

    def _cut(
        self, sample: Sample, ids_L: npt.NDArray[np.int32], weight_L: npt.NDArray[np.float32]
    ) -> list[Encoded]:
        limit, faults = self._max_length, sample.faults
        if len(ids_L) <= limit:
            return [Encoded(ids_L, weight_L, faults=tuple(faults))]
        if self._long_rows is LongRows.drop:
            return []
        if self._long_rows is LongRows.split:
            # One token stands in both pieces: it is predicted in the first, and begins the next.
            parts = (slice(at, at + limit) for at in range(0, len(ids_L) - 1, limit - 1))
            pieces = [(ids_L[part], weight_L[part].copy()) for part in parts]
            for _, weights in pieces[1:]:
                weights[0] = 0
            return [Encoded(i, w, faults=tuple(faults)) for i, w in pieces if w.any()]
        if weight_L.any() and not weight_L[:limit].any():
            faults.append("truncated_target")
        elif weight_L[limit:].any() and sample.spans and not sample.is_text:
            faults.append("end_of_turn")
        ids_L, weight_L = ids_L[:limit].copy(), weight_L[:limit].copy()  # not a view of the whole
        return [Encoded(ids_L, weight_L, True, tuple(dict.fromkeys(faults)))]

    def _filling(self, sample: Sample, ids: list[int], offsets: list[Span]) -> int:
        """Characters before the first target whose tokens alone fill the limit; 0: too few.

        They end with a control token, so that they give the same tokens whatever follows.
        """
        if sample.is_text or sample.protected.aliased or self._long_rows is LongRows.split:
            return 0
        controls = self.template.controls
        if not controls.are_borders:
            return 0
        for i in range(self._max_length, len(ids)):
            if offsets[i][1] > sample.spans[0][0]:
                break
            if ids[i] in controls.numbers:
                return offsets[i][1]
        return 0


def _begins_alike(sample: Sample, full: Sample) -> bool:
    """Whether what fills the limit in `full` also stands before all that `sample` teaches."""
    num = full.num_filling
    text = sample.protected.text
    return (
        sample.protected.aliased is None
        and all(span[0] >= num for span in sample.spans)
        and text[:num] == full.protected.text[:num]
    )


def token_weights(
    offsets: Sequence[Span], spans: Sequence[Span | Weighted]
) -> npt.NDArray[np.float32]:
    """For every token that covers a character of a span the span's weight (1 if it has none).

    Spans are in order and do not overlap. Tokenizers that trim offsets give a token of spaces an
    empty range: such a token covers what lies between the token before and its own end.
    """
    weight_L = np.zeros(len(offsets), np.float32)
    if not spans or not len(offsets):
        return weight_L
    start_L, end_L = (
        np.fromiter(chain.from_iterable(offsets), np.int64, 2 * len(offsets)).reshape(-1, 2).T
    )
    if (start_L >= end_L).any():
        before_L = np.concatenate([[0], end_L[:-1]])
        start_L = np.where(start_L < end_L, start_L, before_L)
    for span in reversed(spans):  # a token of two spans has the weight of the first
        first, last = span[0], span[1]
        i, j = np.searchsorted(end_L, first, "right"), np.searchsorted(start_L, last, "left")
        weight_L[i:j][start_L[i:j] < end_L[i:j]] = span[2] if len(span) > 2 else 1.0
    return weight_L
