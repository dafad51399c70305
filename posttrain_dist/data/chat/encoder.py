"""Record -> Examples: tokens and their weights as targets. Nothing later changes a mask.

Record -> supervised texts -> one call of the tokenizer -> Examples
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from posttrain_dist.data import Form, LongRows, Template, template_rules
from posttrain_dist.data.chat.checks import token_faults
from posttrain_dist.data.chat.checks.check_table import Faults
from posttrain_dist.data.chat.rendering.template_choice import TemplateSet, load_templates
from posttrain_dist.data.chat.supervision import SupervisedText, Supervision
from posttrain_dist.data.chat.text_tokenizer import TextTokenizer, unpadded
from posttrain_dist.data.chat.token_weights import token_weights
from posttrain_dist.data.chat.variable_advice import VariableAdvice
from posttrain_dist.data.formats.plain import IGNORED
from posttrain_dist.data.tokens.text_tokens import TextTokens
from posttrain_dist.errors import DataError, PosttrainError, raise_all
from posttrain_dist.flow import Example, Record

# What the tokenizer is given at once: its answer takes some hundred bytes per character.
_BATCH = 256  # texts
_BATCH_CHARACTERS = 1 << 20
# Channels and samples have numbers only once the rows of all files are known.
_NUMBERED_LATER = -1


class RowExamples(NamedTuple):
    """What comes of one row."""

    examples: list[Example]  # none: the row is left out; `channel` and `sample_id` are -1 yet
    faults: list[str]  # the checks that it fails: names of CHECKS, each once
    by_turns: bool = False  # each example is one turn of a conversation

    @property
    def is_units(self) -> bool:
        """Whether these are prompts, and answers to them behind each.

        `parent` and `unit` count from the first of these examples.
        """
        return any(example.unit is not None for example in self.examples)


class Encoder:
    """Turns records into examples with one tokenizer and one template.

    Args:
        tokenizer: a fast tokenizer of transformers.
        choice: which template, and what is supervised.
        max_length: tokens per sample at most.
        long_rows: what becomes of longer ones.
        templates: the loaded ones; null: they are loaded with the first conversation.
        ends: tokens at which generation stops, by the model's generation config.

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
        templates: TemplateSet | None = None,
        ends: Sequence[str] = (),
    ) -> None:
        raise_all([rule.error() for rule in template_rules(choice) if not rule.holds])
        self._tokenizer, self._choice = tokenizer, choice
        self._max_length, self._long_rows = max_length, long_rows
        self._texts = TextTokenizer(tokenizer)
        # Kept here: a tokenizer looks them up each time.
        self._bos, self._eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        self._bos_name = str(tokenizer.bos_token)
        self._loaded, self._ends = templates, ends
        self._supervision = Supervision(choice, lambda: self.templates)
        self._advice: VariableAdvice | None = None  # made when it is asked for

    @property
    def templates(self) -> TemplateSet:
        """The chat templates.

        Raises:
            ConfigError, ModelError: they cannot be used.
        """
        if self._loaded is None:
            self._loaded = load_templates(self._choice, self._tokenizer, ends=self._ends)
        return self._loaded

    def load(self) -> None:
        """Make now what is otherwise made when needed; errors of the template wait for a row."""
        self._texts.load()
        with contextlib.suppress(PosttrainError):
            template = self.templates.plain
            _ = template.additions, template.probes.trailer

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
        results = self._encode(records)
        for i, result in enumerate(results):
            if isinstance(result, DataError) and records[i].messages:
                results[i] = self.advised(records[i], result)
        return results

    def advised(self, record: Record, error: DataError) -> DataError:
        """The error of a conversation, with the variable of its template that would let it pass."""
        if self._advice is None:
            self._advice = VariableAdvice(self._choice, self.templates)
        return self._advice.extend(record, error)

    def _encode(self, records: Sequence[Record]) -> list[RowExamples | PosttrainError]:
        form, strict = self._choice.form, self._choice.strict
        if form is not Form.auto:
            return self.encode_as(records, form, strict)
        results = self.encode_as(records, Form.conversation, strict=True)
        refused = [
            i
            for i, (record, result) in enumerate(zip(records, results, strict=True))
            if isinstance(result, PosttrainError) and self._supervision.has_turns(record)
        ]
        self._encode_again(records, refused, results, Form.turns, strict=True)
        if not strict:
            refused = [i for i, result in enumerate(results) if isinstance(result, PosttrainError)]
            self._encode_again(records, refused, results, Form.conversation, strict=False)
        return results

    def _encode_again(
        self,
        records: Sequence[Record],
        refused: Sequence[int],
        results: list[RowExamples | PosttrainError],
        form: Form,
        strict: bool,
    ) -> None:
        """Replace the results of some rows."""
        again = self.encode_as([records[i] for i in refused], form, strict)
        for i, result in zip(refused, again, strict=True):
            results[i] = result

    def encode_as(
        self, records: Sequence[Record], form: Form, strict: bool
    ) -> list[RowExamples | PosttrainError]:
        """As `encode_many`, in one form: `conversation` or `turns`; errors without more advice."""
        results: list[RowExamples | PosttrainError] = []
        batch: list[tuple[int, SupervisedText]] = []
        num_characters = 0
        for i, record in enumerate(records):
            row = RowExamples([], [], form is Form.turns and bool(record.messages))
            results.append(row)
            full = None  # a text of this row whose prompt fills the limit
            try:
                if record.input_ids:
                    self._take_tokens(record, row, strict)
                    continue
                for text in self._supervision.texts(record, form, strict):
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
        found = self._texts.tokenise([text for _, text in batch])
        for (i, text), tokens in zip(batch, found, strict=True):
            row = results[i]
            if isinstance(row, PosttrainError):
                continue
            try:
                _add(row, self._finish(text, tokens), text.faults)
            except DataError as error:
                results[i] = error

    def _leave_out(self, text: SupervisedText, row: RowExamples) -> None:
        """A text that is cut as the last one of its row was: before its first target."""
        if self._long_rows is LongRows.truncate:
            _add(row, row.examples[-1:], text.faults)

    def _take_tokens(self, record: Record, row: RowExamples, strict: bool) -> None:
        """A row of tokens is taken as it is."""
        weight_L = np.ones(len(record.input_ids), np.float32)
        if record.labels:
            weight_L = (np.array(record.labels) != IGNORED).astype(np.float32)
        faults = Faults(record.where, strict)
        ids_L = np.array(record.input_ids, np.int32)
        fault = token_faults.bos_fault(ids_L, self._bos, self._eos, self._bos_name)
        faults.note("double_bos", fault)
        self._refuse_no_target(weight_L, faults)
        _add(row, self._cut(ids_L, weight_L, faults, has_turns=False), faults)

    def _finish(self, text: SupervisedText, tokens: TextTokens | None) -> list[Example]:
        if tokens is None:
            whole = slice(0, None)
            encoded = text.own_controls.encode_aliased(text.escaped, whole, text.where)
            tokens = TextTokens.of(*encoded)
        eos = self._eos
        if text.is_plain and (not len(tokens.ids_L) or tokens.ids_L[-1] != eos):
            tokens = tokens.with_end(eos, len(text.text))
        if text.is_turn:
            tokens = self._texts.behind_prompt(text, tokens)
        ids_L = tokens.ids_L
        if not len(ids_L):
            raise DataError(
                "the chat template renders nothing", where=text.where, fix="correct the template"
            )
        # In a row of plain text, special tokens are what they say.
        is_added = not text.is_plain or tokens.start_L[0] == tokens.end_L[0]
        own_L = ids_L[:2] if text.is_plain else ids_L
        fault = ""
        if is_added:
            fault = token_faults.bos_fault(
                own_L,
                self._bos,
                eos,
                self._bos_name,
                lambda i: text.text[tokens.start_L[i] : tokens.end_L[i]].isspace(),
            )
        text.faults.note("double_bos", fault)
        if text.is_plain and not fault:
            text.faults.note("control_tokens", token_faults.quote_fault(ids_L, self._bos, eos))
        weight_L = self._weigh(text, tokens)
        self._refuse_no_target(weight_L, text.faults)
        if len(ids_L) > self._max_length and text.is_turn:
            text.num_filling = self._filling(text, tokens)
            splits = self._long_rows is LongRows.split
            if splits and (end := self._end_of_long(text, ids_L, weight_L)):
                return [end]
        has_turns = bool(text.spans) and not text.is_plain
        return self._cut(ids_L, weight_L, text.faults, has_turns)

    def _refuse_no_target(self, weight_L: npt.NDArray[np.float32], faults: Faults) -> None:
        weight_L[0] = 0  # nothing stands before the first token to predict it from
        if not weight_L.any():
            faults.note("no_target", "the row has no supervised token")

    def _weigh(self, text: SupervisedText, tokens: TextTokens) -> npt.NDArray[np.float32]:
        if text.is_plain and not text.prompts:
            return np.ones(len(tokens.ids_L), np.float32)
        if text.controls is not None and text.controls.strip_ids:
            tokens = unpadded(text.text, tokens, text.controls.strip_ids)
        for length, name, fix in text.prompts:
            if "prompt_prefix" not in text.faults.names:
                fault = self._texts.prompt_fault(text, tokens, length, name)
                text.faults.note("prompt_prefix", fault, fix)
        if text.controls is not None:
            fault = token_faults.end_token_fault(text.text, tokens, text.spans, text.controls.ids)
            text.faults.note("end_of_turn", fault)
        weight_L = token_weights(tokens, text.spans)
        if text.is_plain:
            weight_L[-1] = text.spans[-1][2]  # the end token
        return weight_L

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

    def _end_of_long(
        self,
        text: SupervisedText,
        ids_L: npt.NDArray[np.int32],
        weight_L: npt.NDArray[np.float32],
    ) -> Example | None:
        """Of a turn above the limit: all that is said, behind the end of its prompt.

        It begins with a control token. Null where what is said fills the limit alone.
        """
        begin, first = len(ids_L) - self._max_length, int((weight_L > 0).argmax())
        borders = np.isin(ids_L[begin:first], list(text.own_controls.numbers))
        if begin >= first or not borders.any():
            return None
        begin += int(borders.argmax())
        return _example(ids_L[begin:].copy(), weight_L[begin:].copy(), truncated=True)

    def _filling(self, text: SupervisedText, tokens: TextTokens) -> int:
        """Characters before the first target whose tokens alone fill the limit; 0: too few.

        They end with a control token, so that they give the same tokens whatever follows.
        """
        if text.is_plain or text.escaped.aliased or self._long_rows is LongRows.split:
            return 0
        controls = text.own_controls
        if not controls.are_borders:
            return 0
        behind = slice(self._max_length, None)
        for token, end in zip(
            tokens.ids_L[behind].tolist(), tokens.end_L[behind].tolist(), strict=True
        ):
            if end > text.spans[0][0]:
                break
            if token in controls.numbers:
                return int(end)
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
