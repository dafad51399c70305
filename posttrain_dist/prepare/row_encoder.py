"""The rows of one unit of a file -> Chunks: Examples, and what is known of each row."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain

from posttrain_dist.data import ANSWERS, DataConfig, Template
from posttrain_dist.data.chat.encoder import Encoder, RowExamples
from posttrain_dist.data.chat.rendering.template_choice import TemplateSet
from posttrain_dist.data.compared.answer_encoder import AnsweredRow, AnswerEncoder
from posttrain_dist.data.compared.answer_units import UnitMaker
from posttrain_dist.data.formats.records import Reader, Rejected, Unit
from posttrain_dist.errors import PosttrainError
from posttrain_dist.flow import Record
from posttrain_dist.models.tokenizer import ModelTokenizer
from posttrain_dist.prepare.chunk import BottomK, Chunk, ChunkBuilder, RowFacts
from posttrain_dist.prepare.split import content_key, draw_one

CHUNK_TOKENS = 1 << 20  # after which a chunk is handed over
CHUNK_ROWS = 1 << 14
_FIRST_ROWS = 32  # of the very first chunk
_BATCH_ROWS = 256  # that the tokenizer is given at once
_BATCH_CHARACTERS = 1 << 22  # ... of about so many characters


@dataclass(frozen=True, slots=True)
class Job:
    """What every process that tokenises needs to know."""

    tokenizer: ModelTokenizer
    template: Template
    data: DataConfig
    seed: int
    text_rows: int  # rows of each channel that are kept as text
    ends: tuple[str, ...] = ()  # tokens at which generation stops, by the model's own config
    rows: str = "messages"  # what the objective reads
    own_rows: bool = False  # of an answer only the last token is a target
    without_margin: str = ""  # what of the objective has no place for a row's margin


@dataclass(frozen=True, slots=True)
class Task:
    """One unit of one file set."""

    reader: Reader
    unit: Unit
    in_order: bool  # the rows kept as text are the first ones, not those that the seed draws
    keep_text: bool


class RowEncoder:
    """Encodes units, in this process.

    Args:
        job: what is the same for all units.
        templates: the loaded ones; null: they are loaded with the first conversation.
    """

    def __init__(self, job: Job, templates: TemplateSet | None = None) -> None:
        self._job = job
        self._most_rows = _FIRST_ROWS  # of the next chunk
        self._encoder: Encoder | AnswerEncoder
        if job.rows in ANSWERS:
            self._encoder = AnswerEncoder(
                job.tokenizer,
                job.template,
                compares=job.rows == "pairs",
                without_margin=job.without_margin,
                templates=templates,
                ends=job.ends,
            )
        else:
            self._encoder = Encoder(
                job.tokenizer,
                job.template,
                max_length=job.data.max_length,
                long_rows=job.data.long_rows,
                templates=templates,
                ends=job.ends,
            )

    def load(self) -> None:
        """Make what is otherwise made with the first rows."""
        self._encoder.load()

    def chunks(self, task: Task) -> Iterator[Chunk]:
        """Encode the rows of a unit, some at a time; a row that cannot be used is in its chunk.

        At least one chunk, so that a file without rows is known too.
        """
        job, rows, more = self._job, task.reader.read(task.unit), True
        capacity, share = job.data.max_length, job.data.share_prompt
        units = UnitMaker(job.rows, job.own_rows, capacity, job.data.long_rows, share)
        while more:
            # The first ones are small: what is wrong with all rows is known at once.
            most, self._most_rows = self._most_rows, min(8 * self._most_rows, CHUNK_ROWS)
            texts = BottomK[Record](job.text_rows if task.keep_text else 0)
            facts = RowFacts(task.unit.file, texts)
            builder, num_rows = ChunkBuilder(facts, capacity if share else None), 0
            while more and builder.num_tokens < CHUNK_TOKENS and num_rows < most:
                batch, more = _take(rows, min(_BATCH_ROWS, most))
                num_rows += len(batch)
                made = self._encoded(batch, facts, units)
                for record, result in chain(made, () if more else units.finish()):
                    key = content_key(record)
                    row = builder.add(record, key, result)
                    priority = draw_one(key, job.seed)
                    facts.shown.add(record.channel, priority, row, record.where)
                    facts.texts.add(record.channel, 0 if task.in_order else priority, row, record)
            yield builder.finish()

    def _encoded(
        self, batch: list[Record | Rejected], facts: RowFacts, units: UnitMaker
    ) -> Iterator[tuple[Record, RowExamples]]:
        """The rows that are used; the others are counted. Those with answers become units."""
        used = [row for row in batch if isinstance(row, Rejected) or row.weight]
        facts.num_left_out += len(batch) - len(used)
        results = iter(self._encoder.encode_many([r for r in used if isinstance(r, Record)]))
        for row in used:
            if isinstance(row, Rejected):
                facts.reject(row)
                continue
            result = next(results)
            if isinstance(result, PosttrainError):
                facts.reject(unusable(result, row))
            elif isinstance(result, AnsweredRow):
                yield from units.add(row, result)
            else:
                yield row, result


def _take(rows: Iterator[Record | Rejected], most: int) -> tuple[list[Record | Rejected], bool]:
    """The next rows, fewer where they are large; whether there may be more."""
    batch: list[Record | Rejected] = []
    num_characters = 0
    while len(batch) < most and num_characters < _BATCH_CHARACTERS:
        row = next(rows, None)
        if row is None:
            return batch, False
        batch.append(row)
        if isinstance(row, Record):
            num_characters += len(row.text or "") + 8 * len(row.input_ids)
            turns = chain(row.messages, *(answer.messages for answer in row.answers))
            num_characters += sum(len(str(turn.get("content"))) for turn in turns)
    return batch, True


def unusable(error: PosttrainError, record: Record) -> Rejected:
    """A row that was read and cannot be encoded."""
    file, _, line = record.where.rpartition(":")
    return Rejected(file, int(line), None, "", error.what, error.fix)
