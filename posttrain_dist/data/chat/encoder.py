"""Record -> Examples: tokens and their weights as targets. Nothing later changes a mask.

Record -> supervised texts -> one call of the tokenizer -> Examples
"""

from __future__ import annotations

import contextlib
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from posttrain_dist.data import LongRows, Supervise, Template
from posttrain_dist.data.chat import checks
from posttrain_dist.data.chat.checks import Faults
from posttrain_dist.data.chat.controls import Span
from posttrain_dist.data.chat.supervision import SupervisedText, Supervision
from posttrain_dist.data.chat.template import ChatTemplate, load_template
from posttrain_dist.data.chat.token_weights import token_weights
from posttrain_dist.data.formats.plain import IGNORED
from posttrain_dist.errors import ConfigError, DataError, PosttrainError
from posttrain_dist.flow import Example, Record

if TYPE_CHECKING:
    from tokenizers import Encoding

# What the tokenizer is given at once: its answer takes some hundred bytes per character.
_BATCH = 256  # texts
_BATCH_CHARACTERS = 1 << 20
# Channels and samples have numbers only once the rows of all files are known.
_NUMBERED_LATER = -1


class RowExamples(NamedTuple):
    """What comes of one row."""

    examples: list[Example]  # none: the row is left out; `channel` and `sample_id` are -1 yet
    faults: list[str]  # the checks that it fails: names of CHECKS, each once


class Encoder:
    """Turns records into examples with one tokenizer and one template.

    Args:
        tokenizer: a fast tokenizer of transformers.
        choice: which template, and what is supervised.
        max_length: tokens per sample at most.
        long_rows: what becomes of longer ones.
        template: the loaded template; null: it is loaded with the first conversation.

    Raises:
        ConfigError: the choices contradict each other.
    """

    def __init__(
        self,
        tokenizer: Any,
        choice: Template,
        *,
        max_length: int,
        long_rows: LongRows = LongRows.truncate,
        template: ChatTemplate | None = None,
    ) -> None:
        if choice.explode_turns and choice.supervise is Supervise.all:
            raise ConfigError(
                "makes one sample of each assistant turn, and template.supervise=all also "
                "supervises the other turns",
                where="template.explode_turns",
                fix="set template.supervise=assistant",
            )
        self._tokenizer, self._choice = tokenizer, choice
        self._max_length, self._long_rows = max_length, long_rows
        self._backend = tokenizer.backend_tokenizer
        self._backend.no_truncation()  # a tokenizer.json may bring its own limits
        self._backend.no_padding()
        # Kept here: a tokenizer looks them up each time.
        self._bos, self._eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        self._bos_name = str(tokenizer.bos_token)
        self._loaded = template
        self._supervision = Supervision(choice, lambda: self.template)
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

    def load(self) -> None:
        """Load the chat template now, and find out how it writes; its errors wait for a row."""
        with contextlib.suppress(PosttrainError):
            template = self.template
            _ = template.additions, template.trailer

    def encode(self, record: Record) -> RowExamples:
        """The examples of one row.

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

    def encode_many(self, records: Sequence[Record]) -> list[RowExamples | PosttrainError]:
        """For each row what `encode` returns, or the error that it would raise; in batches.

        Only a DataError is returned; others say that no row can be encoded, and are raised.
        """
        results: list[RowExamples | PosttrainError] = []
        batch: list[tuple[int, SupervisedText]] = []
        num_characters = 0
        for i, record in enumerate(records):
            row = RowExamples([], [])
            results.append(row)
            full = None  # a text of this row whose prompt fills the limit
            try:
                if record.input_ids:
                    self._take_tokens(record, row)
                    continue
                for text in self._supervision.texts(record):
                    if full and _begins_alike(text, full):
                        self._leave_out(text, row)
                        continue
                    batch.append((i, text))
                    num_characters += len(text.text)
                    if len(batch) >= _BATCH or num_characters >= _BATCH_CHARACTERS:
                        self._finish_batch(batch, results)
                        full = text if text.num_filling else full
                        batch, num_characters = [], 0
                    if isinstance(results[i], PosttrainError):
                        break
            except DataError as error:
                results[i] = error
        self._finish_batch(batch, results)
        return results

    def _finish_batch(
        self,
        batch: Sequence[tuple[int, SupervisedText]],
        results: list[RowExamples | PosttrainError],
    ) -> None:
        """Tokenise the texts, and put the examples of each to those of its row."""
        for (i, text), encoding in zip(batch, self._tokenise(batch), strict=True):
            row = results[i]
            if isinstance(row, PosttrainError):
                continue
            try:
                _add(row, self._finish(text, encoding), text.faults)
            except DataError as error:
                results[i] = error

    def _leave_out(self, text: SupervisedText, row: RowExamples) -> None:
        """A text that is cut as the last one of its row was: before its first target."""
        if self._long_rows is LongRows.truncate:
            _add(row, row.examples[-1:], text.faults)

    def _take_tokens(self, record: Record, row: RowExamples) -> None:
        """A row of tokens is taken as it is."""
        weight_L = np.ones(len(record.input_ids), np.float32)
        if record.labels:
            weight_L = (np.array(record.labels) != IGNORED).astype(np.float32)
        faults = Faults(record.where, self._choice.strict)
        fault = checks.bos_fault(record.input_ids, self._bos, self._eos, self._bos_name)
        faults.note("double_bos", fault)
        self._refuse_no_target(weight_L, faults)
        ids_L = np.array(record.input_ids, np.int32)
        _add(row, self._cut(ids_L, weight_L, faults, has_turns=False), faults)

    # ---------------------------------------------------------------------------- text -> tokens

    def _tokenise(self, batch: Sequence[tuple[int, SupervisedText]]) -> Iterator[Encoding | None]:
        """The encoding of each text; nothing where some of its control tokens are forged."""
        plain = [text for _, text in batch if text.escaped.aliased is None]
        # The template has written BOS and all other special tokens itself.
        chats = [each.text for each in plain if not each.is_plain]
        texts = [each.text for each in plain if each.is_plain]
        of_chats = iter(self._backend.encode_batch(chats, add_special_tokens=False))
        of_texts = iter(self._backend.encode_batch(texts))
        for _, text in batch:
            if text.escaped.aliased is not None:
                yield None
            else:
                yield next(of_texts if text.is_plain else of_chats)

    def _finish(self, text: SupervisedText, encoding: Encoding | None) -> list[Example]:
        if encoding is not None:
            ids, offsets = encoding.ids, encoding.offsets
        else:
            whole = slice(0, None)
            ids, offsets = self.template.controls.encode_aliased(text.escaped, whole, text.where)
        eos = self._eos
        if text.is_plain and (not ids or ids[-1] != eos):
            ids, offsets = [*ids, eos], [*offsets, (len(text.text),) * 2]
        if not ids:
            raise DataError(
                "the chat template renders nothing", where=text.where, fix="correct the template"
            )
        # In a row of plain text, special tokens are what they say.
        is_added = not text.is_plain or offsets[0][0] == offsets[0][1]
        own = ids[:2] if text.is_plain else ids
        fault = checks.bos_fault(own, self._bos, eos, self._bos_name) if is_added else ""
        text.faults.note("double_bos", fault)
        if text.is_plain and not fault:
            text.faults.note("control_tokens", checks.quote_fault(ids, self._bos, eos))
        weight_L = self._weigh(text, ids, offsets)
        self._refuse_no_target(weight_L, text.faults)
        if len(ids) > self._max_length and self._choice.explode_turns and text.prompts:
            text.num_filling = self._filling(text, ids, offsets)
        has_turns = bool(text.spans) and not text.is_plain
        return self._cut(np.array(ids, np.int32), weight_L, text.faults, has_turns)

    def _refuse_no_target(self, weight_L: npt.NDArray[np.float32], faults: Faults) -> None:
        weight_L[0] = 0  # nothing stands before the first token to predict it from
        if not weight_L.any():
            faults.note("no_target", "the row has no supervised token")

    def _weigh(
        self, text: SupervisedText, ids: list[int], offsets: list[Span]
    ) -> npt.NDArray[np.float32]:
        if text.is_plain and not text.prompts:
            return np.ones(len(ids), np.float32)
        if not text.is_plain and self.template.controls.strip_ids:
            offsets = self._unpadded(text.text, ids, offsets)
        for length, name, fix in text.prompts:
            if "prompt_prefix" not in text.faults.names:
                fault = self._token_fault(text, ids, offsets, length, name)
                text.faults.note("prompt_prefix", fault, fix)
        weight_L = token_weights(offsets, text.spans)
        if text.is_plain:
            weight_L[-1] = 1  # the end token
        return weight_L

    def _unpadded(self, text: str, ids: list[int], offsets: list[Span]) -> list[Span]:
        """Offsets of special tokens without the white space that they swallow."""
        swallow = self.template.controls.strip_ids
        trimmed = list(offsets)
        for i, (start, end) in enumerate(offsets):
            if ids[i] in swallow:
                start += len(text[start:end]) - len(text[start:end].lstrip())
                trimmed[i] = (start, start + len(text[start:end].strip()))
        return trimmed

    def _token_fault(
        self, text: SupervisedText, ids: list[int], offsets: list[Span], length: int, name: str
    ) -> str:
        """The prompt's text begins the training text; do its tokens?

        No merge crosses a control token. So only what stands from the prompt's last control
        token on has to be tokenised, and that is the same few characters in most rows.
        """
        if text.is_plain:
            tail = self._backend.encode(text.text[:length]).ids
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
        if text.escaped.aliased is not None:
            part = slice(start, length)
            tail, _ = controls.encode_aliased(text.escaped, part, text.where)
        else:
            tail = self._tail(text.text[start:length])
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
        self,
        ids_L: npt.NDArray[np.int32],
        weight_L: npt.NDArray[np.float32],
        faults: Faults,
        has_turns: bool,
    ) -> list[Example]:
        """The examples of one text; `has_turns`: its targets end with an end-of-turn token."""
        limit = self._max_length
        if len(ids_L) <= limit:
            return [_example(ids_L, weight_L)]
        if self._long_rows is LongRows.drop:
            return []
        if self._long_rows is LongRows.split:
            # One token stands in both pieces: it is predicted in the first, and begins the next.
            parts = (slice(at, at + limit) for at in range(0, len(ids_L) - 1, limit - 1))
            pieces = [(ids_L[part], weight_L[part].copy()) for part in parts]
            for _, weights in pieces[1:]:
                weights[0] = 0
            return [_example(ids, weights) for ids, weights in pieces if weights.any()]
        cut = ""
        if weight_L.any() and not weight_L[:limit].any():
            cut = "truncated_target"
        elif weight_L[limit:].any() and has_turns:
            cut = "end_of_turn"  # how many rows may lack it is decided when all are known
        if cut and cut not in faults.names:
            faults.names.append(cut)
        ids_L, weight_L = ids_L[:limit].copy(), weight_L[:limit].copy()  # not a view of the whole
        return [_example(ids_L, weight_L, truncated=True)]

    def _filling(self, text: SupervisedText, ids: list[int], offsets: list[Span]) -> int:
        """Characters before the first target whose tokens alone fill the limit; 0: too few.

        They end with a control token, so that they give the same tokens whatever follows.
        """
        if text.is_plain or text.escaped.aliased or self._long_rows is LongRows.split:
            return 0
        controls = self.template.controls
        if not controls.are_borders:
            return 0
        for i in range(self._max_length, len(ids)):
            if offsets[i][1] > text.spans[0][0]:
                break
            if ids[i] in controls.numbers:
                return offsets[i][1]
        return 0


def _example(
    ids_L: npt.NDArray[np.int32], weight_L: npt.NDArray[np.float32], truncated: bool = False
) -> Example:
    return Example(ids_L, weight_L, _NUMBERED_LATER, _NUMBERED_LATER, truncated)


def _add(row: RowExamples, examples: list[Example], faults: Faults) -> None:
    """The examples of one text; where none is kept, its faults are nobody's."""
    row.examples.extend(examples)
    if examples:
        row.faults.extend(name for name in faults.names if name not in row.faults)


def _begins_alike(text: SupervisedText, full: SupervisedText) -> bool:
    """Whether what fills the limit in `full` also stands before every target of `text`."""
    num = full.num_filling
    return (
        text.escaped.aliased is None
        and all(span[0] >= num for span in text.spans)
        and text.text.startswith(full.text[:num])
    )
