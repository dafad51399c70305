"""The table of formats: the keys of each, and what reads its rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from posttrain_dist.data import Format
from posttrain_dist.data.formats.loss_weight import ROW_KEYS, SPELLINGS, read_row_weight
from posttrain_dist.data.formats.nulls import NULL_ARGUMENTS, drop_foreign_arguments
from posttrain_dist.data.formats.pairs import read_prompt, read_prompt_completion, read_reference
from posttrain_dist.data.formats.plain import read_plain, read_tokens
from posttrain_dist.data.formats.preferences import (
    Answered,
    read_preference,
    read_ranking,
    read_scored_answers,
    read_scored_completion,
    read_unpaired,
)
from posttrain_dist.data.formats.template_kwargs import KEY as TEMPLATE_KWARGS
from posttrain_dist.data.formats.template_kwargs import read_template_kwargs
from posttrain_dist.data.formats.turns import Turns, read_alpaca, read_conversation, read_tools
from posttrain_dist.data.read.bad_row import bad_field
from posttrain_dist.flow import Message

# Keys that would change what is trained; any other unknown key is the user's own note.
_NEVER = ("functions", "documents", "images", "videos", "audios")


@dataclass(frozen=True)
class Shape:
    """The keys of one format, and the function that reads a Record's fields from such a row."""

    needs: tuple[str, ...]
    may: tuple[str, ...]  # keys that are read where they are there
    example: str
    read: Callable[[dict[str, Any]], dict[str, Any]]  # row -> fields of Record
    never: tuple[str, ...] = _NEVER
    # Keys that would give the row a weight, which it cannot have; null: it can.
    weightless: tuple[str, ...] | None = (*ROW_KEYS, *SPELLINGS)


def _of_turns(row: dict[str, Any], messages: tuple[Message, ...]) -> dict[str, Any]:
    """The fields of a Record whose turns are these."""
    tools = read_tools(row.get("tools"))
    messages, has_null = drop_foreign_arguments(messages, tools)
    filled = {"messages": messages, "tools": tools, "variables": read_template_kwargs(row)}
    return filled | ({"notes": (NULL_ARGUMENTS,)} if has_null else {})


def _answered(
    read: Callable[[dict[str, Any]], Answered],
) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """What reads the fields of a Record with answers."""

    def read_fields(row: dict[str, Any]) -> dict[str, Any]:
        prompt, answers = read(row)
        filled = _of_turns(row, prompt)
        kept = []
        for answer in answers:
            messages, has_null = drop_foreign_arguments(answer.messages, filled["tools"])
            kept.append(replace(answer, messages=messages))
            filled |= {"notes": (NULL_ARGUMENTS,)} if has_null else {}
        return filled | {"answers": tuple(kept)}

    return read_fields


def _conversation(row: dict[str, Any], turns: Turns) -> dict[str, Any]:
    filled = _of_turns(row, turns.messages)
    return filled | {"weights": turns.weights, "weight": read_row_weight(row)}


def _prompt_completion(row: dict[str, Any]) -> dict[str, Any]:
    pair = read_prompt_completion(row)
    if isinstance(pair, Turns):
        return _conversation(row, pair)
    for name in ("tools", TEMPLATE_KWARGS):
        if row.get(name):
            fix = f"remove {name}"
            raise bad_field(name, "needs prompt and completion as lists of turns", fix)
    return {"text": pair[0], "supervised_from": pair[1], "weight": read_row_weight(row)}


def _tokens(row: dict[str, Any]) -> dict[str, Any]:
    input_ids, labels = read_tokens(row)
    return {"input_ids": input_ids, "labels": labels}


def _prompt(row: dict[str, Any]) -> dict[str, Any]:
    used = {"prompt", "tools", "task_type", "check", "train", TEMPLATE_KWARGS}
    reference = read_reference(row, used)
    return _of_turns(row, read_prompt(row)) | {"reference": reference}


_ROW = (*ROW_KEYS, TEMPLATE_KWARGS)
_BESIDE_ANSWERS = ("tools", "system", TEMPLATE_KWARGS)
_TURNS = '[{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]'
# In the order of errors; a format stands before those whose keys are part of its own.
FORMATS: dict[Format, Shape] = {
    Format.messages: Shape(
        ("messages",),
        ("tools", *_ROW),
        '{"messages": ' + _TURNS + ', "task_type": "..."}',
        lambda row: _conversation(row, read_conversation(row, "messages")),
        weightless=None,
    ),
    Format.sharegpt: Shape(
        ("conversations",),
        ("tools", "system", *_ROW),
        '{"conversations": [{"from": "human", "value": "..."}, {"from": "gpt", "value": "..."}]}',
        lambda row: _conversation(row, read_conversation(row, "conversations")),
        weightless=None,
    ),
    Format.alpaca: Shape(
        ("instruction", "output"),
        ("input", "system", "history", *_ROW),
        '{"instruction": "...", "input": "...", "output": "..."}',
        lambda row: _conversation(row, read_alpaca(row)),
        weightless=None,
    ),
    Format.prompt_completion: Shape(
        ("prompt", "completion"),
        ("tools", *_ROW),
        '{"prompt": "...", "completion": "..."}',
        _prompt_completion,
        weightless=None,
    ),
    Format.text: Shape(
        ("text",),
        (),
        '{"text": "...", "task_type": "..."}',
        lambda row: {"text": read_plain(row)},
        (*_NEVER, "tools", TEMPLATE_KWARGS),
    ),
    Format.tokens: Shape(
        ("input_ids",),
        ("labels", "attention_mask"),
        '{"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}',
        _tokens,
        (*_NEVER, "completion_mask", "assistant_masks", "position_ids", TEMPLATE_KWARGS),
    ),
    Format.preference: Shape(
        ("chosen", "rejected"),
        ("prompt", "margin", *_BESIDE_ANSWERS),
        '{"prompt": "...", "chosen": "...", "rejected": "..."}',
        _answered(read_preference),
    ),
    Format.ranking: Shape(
        ("prompt", "answers"),
        ("ranks", *_BESIDE_ANSWERS),
        '{"prompt": "...", "answers": ["the best", "...", "the worst"]}',
        _answered(read_ranking),
    ),
    Format.scored_answers: Shape(
        ("prompt", "answers", "scores"),
        _BESIDE_ANSWERS,
        '{"prompt": "...", "answers": ["...", "..."], "scores": [0.9, 0.1]}',
        _answered(read_scored_answers),
    ),
    Format.scored_completion: Shape(
        ("prompt", "completion", "score"),
        _BESIDE_ANSWERS,
        '{"prompt": "...", "completion": "...", "score": 0.9}',
        _answered(read_scored_completion),
    ),
    Format.unpaired: Shape(
        ("prompt", "completion", "label"),
        _BESIDE_ANSWERS,
        '{"prompt": "...", "completion": "...", "label": true}',
        _answered(read_unpaired),
    ),
    Format.prompt: Shape(
        ("prompt",),
        ("tools", TEMPLATE_KWARGS),
        '{"prompt": "...", "answer": "..."}',
        _prompt,
        ("images", "videos", "audios"),
        ("train",),  # whatever else it holds is its reward's
    ),
}
# The objective that trains on a format; `tokens` is read by two, `prompt` by none yet.
OBJECTIVES: dict[Format, str] = {
    Format.messages: "sft",
    Format.sharegpt: "sft",
    Format.alpaca: "sft",
    Format.prompt_completion: "sft",
    Format.text: "pretrain",
    Format.preference: "dpo",
    Format.ranking: "dpo",
    Format.scored_answers: "dpo",
    Format.scored_completion: "reward objective.loss_type=regression",
    Format.unpaired: "kto",
}
WITH_CHECK = {Format.messages, Format.sharegpt, Format.alpaca, Format.prompt_completion}
