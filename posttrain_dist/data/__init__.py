"""The data pipeline, from files to batches: one line per stage, in order. Read this file fourth.

stage              file                      in -> out
-----------------  ------------------------  --------------------------------------------------
choose files       sources.py                DataConfig -> FileSets: the sources, held-out rows
                   embedded.py               the data set of the package, by its digest
read               read/containers.py        path -> units -> (line, byte, JSON value)
                   read/json_lines.py        ... of JSON lines, read/json_array.py of an array,
                   read/tables.py            ... of parquet, CSV and Hugging Face datasets
                   read/json_cells.py        ... JSON in their cells, by its Arrow type
recognise          formats/recognise.py      keys of the first rows -> Format; row -> Record
                   formats/shapes.py         ... the table of formats
                   formats/turns.py          ... rows that hold one conversation
                   formats/pairs.py          ... a prompt and one answer, a prompt alone
                   formats/preferences.py    ... answers that are compared or rated
                   formats/plain.py          ... text and tokens
                   formats/loss_weight.py    ... what a turn or a row weighs in the loss
                   formats/nulls.py          ... nulls of tables in tools and their calls
                   formats/template_kwargs.py  ... what the chat template reads beside it
records            formats/records.py        path -> Record, or Rejected with file, line and field
template           chat/rendering/           template.name + tokenizer -> TemplateSet
                   .../template_choice.py    ... which template a row is rendered by
                   .../chat_template.py      ... messages -> text
                   .../template_probes.py    ... how it ends turns, writes thoughts, and prompts
                   .../jinja_environment.py  ... what it may use: as in transformers
                   .../causal.py             ... whether one rendering holds those of all prefixes
                   .../served.py             served.json: what an export renders, and is checked by
                   .../served_template.py    ... the template with the run's variables as defaults
                   .../answer_reader.py      what a model says -> its thoughts and its words
thoughts           chat/thoughts.py          messages -> those with the thoughts that are trained on
escape             chat/controls.py          control tokens in content -> EscapedText
render             chat/conversation.py      messages -> text, and each turn's inference prompt
mask               chat/turn_spans.py        text -> the characters of each turn
                   chat/turn_ends.py         ... and of the tokens that end it
                   chat/turn_form.py         messages -> one turn behind its inference prompt
check              chat/checks/              text and spans -> names of failed checks
                   chat/variable_advice.py   ... and the variable that would let a row pass
supervise          chat/supervision.py       Record -> SupervisedText: characters with weights
encode             chat/encoder.py           Record -> Examples, whole or turn by turn
                   chat/text_tokenizer.py    ... SupervisedText -> tokens
                   tokens/byte_level.py      ... text -> tokens, word by word (tokens/patterns.py)
                   tokens/text_tokens.py     ... the tokens of a text, with their characters
                   chat/token_weights.py     ... character weights -> token weights
                   prepared/pieces.py        Example -> text for people, chat/turn_view.py by turns
compare            compared/answer_encoder.py  Record -> tokens of its prompt and its answers
                   compared/other_answers.py ... each with an answer to another prompt
                   compared/answer_units.py  ... -> Examples: the prompt, the answers behind it
prepare            (posttrain_dist.prepare)  all files -> the prepared folder, split and counted
                   prepared/arrays.py        Examples as flat arrays on disk, mapped by workers
                   prepared/trees.py         ... samples of a row that begin alike, as trees
                   prepared/units.py         ... and the sizes of samples that stay together
                   prepared/summary.py       what was found: counts, channels, digests
mix                packs/mixing.py           weights of sources -> samples of an epoch
order              packs/order.py            (seed, epoch) -> packs of each step
                   packs/packing.py          ... lengths -> packs, by best fit
                   packs/balance.py          ... packs -> ranks, by cost
batch              packs/collate.py          Examples of a pack -> Batch
                   packs/heaviest.py         ... the micro-batches that take the most memory
                   packs/loader.py           step k -> the Batches of this rank
                   packs/prefetch.py         ... made in a thread, ahead of the step
-----------------  ------------------------  --------------------------------------------------

Here are the configs of the groups `data` and `template`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from datetime import datetime
from enum import Enum
from typing import Any

from posttrain_dist.errors import Rule, at_least

# The products of packing (window, length, number of the sample) fit into 64 bits.
MAX_LENGTH = 1 << 24  # tokens
MAX_WINDOW = 1 << 24  # samples
MAX_WEIGHT = 1_000_000_000
MAX_PASSES = 10_000  # over the data: each is planned before the first step
# What an objective may read (`Objective.rows`): rows of answers to a prompt, which become units of
# samples, and of these the single answers that pairs can be made into.
ANSWERS = frozenset({"pairs", "labels", "scores"})
CONVERTS = frozenset({"labels", "scores"})

__all__ = [
    "ANSWERS",
    "CONVERTS",
    "MAX_LENGTH",
    "MAX_PASSES",
    "MAX_WINDOW",
    "DataConfig",
    "Form",
    "Format",
    "LongRows",
    "MixBy",
    "OnBadRow",
    "Source",
    "Supervise",
    "Template",
    "Thinking",
]


class Format(Enum):
    """How a row is written; docs/data.md shows each."""

    auto = "auto"  # recognised from the first rows
    messages = "messages"
    sharegpt = "sharegpt"
    alpaca = "alpaca"
    prompt_completion = "prompt_completion"
    text = "text"
    tokens = "tokens"
    preference = "preference"
    ranking = "ranking"
    scored_answers = "scored_answers"
    scored_completion = "scored_completion"
    unpaired = "unpaired"
    prompt = "prompt"


class OnBadRow(Enum):
    """What becomes of a row that cannot be used."""

    error = "error"
    skip = "skip"  # left out and counted


class LongRows(Enum):
    """What becomes of a row above `data.max_length` tokens."""

    truncate = "truncate"
    split = "split"  # into several samples
    drop = "drop"


class MixBy(Enum):
    """What the weights of sources are shares of."""

    rows = "rows"
    tokens = "tokens"  # supervised ones


@dataclass(kw_only=True, slots=True)
class Source:
    """One of several weighted sources; they can be given in YAML only."""

    path: str = "???"
    weight: float = 1.0  # its share is weight / sum of weights
    max_passes: float | None = None  # times that a row is drawn in an epoch at most
    # Other weights from a step on: {0: 1.0, 500: 0.2}; empty: `weight` throughout.
    schedule: dict[int, float] = field(default_factory=dict)


@dataclass(kw_only=True, slots=True)
class DataConfig:
    """What to train on and how it is cut."""

    # A file, folder or glob; `embedded` is the data set that comes with the package.
    train: str = "embedded"
    sources: dict[str, Source] = field(default_factory=dict)  # instead of `train`: name -> source
    mix_by: MixBy = MixBy.rows
    # The same as `train` for held-out rows; null: a share of the training rows (`embedded` has
    # its own).
    eval: str | None = None
    eval_fraction: float = 0.05  # share of training rows held out when `eval` is null
    format: Format = Format.auto
    columns: dict[str, str] = field(default_factory=dict)  # our name -> the name in the files
    on_bad_row: OnBadRow = OnBadRow.error
    max_length: int = 2048  # tokens per pack at most
    long_rows: LongRows = LongRows.truncate
    # Read pairs where single answers are asked for: the chosen one is desirable (worth 1), the
    # rejected one is not (0).
    convert_pairs: bool = False
    # Compute what samples of a row begin with, such as the prompt of its answers, once; false: in
    # each of them, for the same loss.
    share_prompt: bool = True
    pack_window: int = 4096  # samples that packing may reorder among themselves
    workers: int | None = None  # processes that tokenise; null: one per core
    cache: str | None = None  # folder of prepared data; null: posttrain/ in the user's cache


class Supervise(Enum):
    """Which messages are supervised where a row does not say so itself."""

    assistant = "assistant"  # every assistant turn
    last_turn = "last_turn"  # the last assistant turn
    all = "all"  # every message but the results of tools


class Form(Enum):
    """What a sample of a conversation is."""

    auto = "auto"  # the conversation where that is proven right, else its turns
    conversation = "conversation"  # all of it, rendered once
    turns = "turns"  # one sample for each supervised turn: its inference prompt, the turn, its end


class Thinking(Enum):
    """What becomes of the thoughts of an assistant."""

    keep = "keep"  # they are trained on
    # Where they are taken out, a block that the prompt opens is closed empty, and that is learned.
    last = "last"  # those of the last assistant turn are trained on; all others are taken out
    none = "none"  # they are taken out
    close = "close"  # as `keep`, and a turn without thoughts closes such a block too


@dataclass(kw_only=True, slots=True)
class Template:
    """The group `template`: how a conversation becomes text, and what of it is supervised."""

    name: str = "tokenizer"  # the tokenizer's own; or one of data/chat/templates; or a .jinja file
    variant: str | None = None  # of a tokenizer's own templates by name: the one for all rows
    # What the template reads beside messages and tools, such as {enable_thinking: false}.
    variables: dict[str, Any] = field(default_factory=dict)
    form: Form = Form.auto
    thinking: Thinking = Thinking.keep
    supervise: Supervise = Supervise.assistant
    end_of_turn: str | None = None  # a token, for templates that write none behind a turn
    strict: bool = True  # a failed check stops; false: it is reported


# Names that `apply_chat_template` takes for itself.
RESERVED_VARIABLES = frozenset(
    {
        *("messages", "conversation", "tools", "documents", "add_generation_prompt", "tokenize"),
        *("chat_template", "continue_final_message", "return_dict", "return_tensors"),
    }
)


CLOCK = "strftime_now"  # the function of a template that writes today's date


def template_rules(template: Template) -> list[Rule]:
    """What must hold among the values of the group `template`."""
    return [
        *(
            Rule(
                name not in RESERVED_VARIABLES,
                f"template.variables.{name}",
                "is no variable of a template: each row says it itself",
                "leave it out; tools and messages are keys of the rows",
            )
            for name in template.variables
        ),
        *(
            Rule(
                str(value).lower() not in ("true", "false") or isinstance(value, bool),
                f"template.variables.{name}",
                f"is the text {value!r}, which a template takes for true",
                f"write it without quotes: {str(value).lower()}",
            )
            for name, value in template.variables.items()
        ),
        *(
            Rule(
                _is_json(value),
                f"template.variables.{name}",
                f"is {value!r}, which no JSON has",
                "give text, a finite number, true, false, null, or lists and dicts of these",
            )
            for name, value in template.variables.items()
        ),
        Rule(
            CLOCK not in template.variables or is_date(template.variables[CLOCK]),
            f"template.variables.{CLOCK}",
            f"is {template.variables.get(CLOCK)!r}, must be the date that is written as today's",
            f"write it in quotes: 'template.variables={{{CLOCK}: \"2026-07-26\"}}'",
        ),
        Rule(
            template.form is not Form.turns or template.supervise is not Supervise.all,
            "template.form",
            "is turns: one sample of each assistant turn, and template.supervise=all also "
            "supervises the other turns",
            "set template.supervise=assistant",
        ),
    ]


def answer_rules(data: DataConfig, template: Template, rows: str) -> list[Rule]:
    """What must hold of `data` and `template` for an objective that reads `rows`."""
    return [
        Rule(
            rows not in ANSWERS or data.long_rows is not LongRows.split,
            "data.long_rows",
            "is split, and the answers to one prompt stay together: a part of one cannot be "
            "compared",
            "set data.long_rows=truncate (the longest answers of a row are cut) or drop",
        ),
        Rule(
            rows not in ANSWERS or template.supervise is Supervise.assistant,
            "template.supervise",
            f"is {template.supervise.name}, and answers are compared by all turns of the assistant "
            "in them",
            "set template.supervise=assistant",
        ),
        Rule(
            not data.convert_pairs or rows in CONVERTS,
            "data.convert_pairs",
            f"makes single answers of pairs, and this objective reads {rows}",
            "leave it out",
        ),
    ]


def _is_json(value: Any) -> bool:
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_json(each) for key, each in value.items())
    if isinstance(value, list):
        return all(map(_is_json, value))
    if isinstance(value, str):
        return value.isprintable() or not any(0xD800 <= ord(char) < 0xE000 for char in value)
    return value is None or (isinstance(value, int | float) and math.isfinite(value))


def is_date(value: Any) -> bool:
    """Whether a value is a date as text, such as "2026-07-26"."""
    try:
        return isinstance(value, str) and bool(datetime.fromisoformat(value))
    except ValueError:
        return False


def data_rules(data: DataConfig) -> list[Rule]:
    """What must hold among the values of the group `data`."""
    rules = [
        at_least("data.max_length", data.max_length, 2, MAX_LENGTH),
        at_least("data.pack_window", data.pack_window, 1, MAX_WINDOW),
        at_least("data.workers", data.workers, 1, 10**4),
        Rule(
            0 <= data.eval_fraction < 1,
            "data.eval_fraction",
            f"is {data.eval_fraction}, must be in [0, 1)",
            "set a share such as 0.05",
        ),
        Rule(
            not data.sources or data.train == DataConfig().train,
            "data.sources",
            "is set together with data.train",
            "give all training rows as sources, or none",
        ),
        Rule(
            not data.sources or any(source.weight > 0 for source in data.sources.values()),
            "data.sources",
            "holds no source of a weight above 0",
            "give at least one source a weight",
        ),
        Rule(
            "eval" not in data.sources,
            "data.sources.eval",
            "is a reserved name",
            "rename it",
        ),
    ]
    for name, source in data.sources.items():
        key = f"data.sources.{name}"
        weights = {"weight": source.weight}
        weights |= {f"schedule.{step}": weight for step, weight in source.schedule.items()}
        rules += [
            Rule(
                0 <= weight <= MAX_WEIGHT,
                f"{key}.{place}",
                f"is {weight}, must be in [0, {MAX_WEIGHT:,}]",
                "set a weight such as 1.0",
            )
            for place, weight in weights.items()
        ]
        rules += [at_least(f"{key}.schedule", step, 0) for step in source.schedule]
        rules.append(
            Rule(
                source.max_passes is None or 0 < source.max_passes <= MAX_PASSES,
                f"{key}.max_passes",
                f"is {source.max_passes}, must be above 0 and at most {MAX_PASSES:,}",
                "set how often a row may be drawn in an epoch, or null",
            )
        )
    return rules
