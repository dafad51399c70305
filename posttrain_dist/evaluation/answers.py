"""Answers to held-out rows before and after training, and how many are right.

prepared/heldout_records.jsonl -> choose -> answer (base, what the run made) -> answers.json
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from posttrain_dist.config import RunConfig
from posttrain_dist.data.chat.rendering.served import Prompt
from posttrain_dist.data.chat.thoughts import CLOSING
from posttrain_dist.errors import DataError
from posttrain_dist.evaluation.chat_generator import load_generator
from posttrain_dist.files import write_atomic
from posttrain_dist.flow import Message
from posttrain_dist.generation.adapter_places import BASE
from posttrain_dist.generation.base import Reply, Sampling, StopReason
from posttrain_dist.generation.local import LocalGenerator
from posttrain_dist.models import Weights


def exact_match(rows: list[dict[str, Any]], answers: list[str]) -> dict[str, dict[str, int]]:
    """Right answers per channel, over rows with `check == "exact"`.

    An answer is right if it equals the last assistant turn, thoughts and white space at both ends
    aside.

    Returns:
        channel -> {"right": rows answered rightly, "of": rows answered}.
    """
    found: dict[str, dict[str, int]] = {}
    for row, answer in zip(rows, answers, strict=True):
        if row.get("check") != "exact":
            continue
        count = found.setdefault(row["task_type"], {"right": 0, "of": 0})
        count["of"] += 1
        count["right"] += _final(answer) == _final(_split(row)[1])
    return found


def _words(replies: list[Reply]) -> list[str]:
    return [reply.text for reply in replies]


def _final(answer: str) -> str:
    """What an answer says once its thoughts are closed."""
    return CLOSING.split(answer)[-1].strip()


def compare(config: RunConfig, run_folder: Path) -> dict[str, Any]:
    """Answer held-out rows with the base model and what the run made; write answers.json.

    Answered are up to `eval.generate_rows` rows of each channel with one right answer, and
    `eval.samples` rows of the other channels in turn. With `model.weights=random` there is no
    model before: its counts are absent and its answers empty.

    Returns:
        what answers.json holds: "exact_match" (before and after, as `exact_match` counts) and
        "samples" (channel, prompt, reference, before, after).

    Raises:
        DataError: the run folder has no held-out rows.
        ModelError: base model, export or adapter cannot be loaded.
    """
    rows = _read_rows(run_folder / "prepared" / "heldout_records.jsonl")
    exact = _exact_rows(rows, config.eval.generate_rows)
    samples = _sample_rows(rows, config.eval.samples)
    chosen = exact + samples
    sampling = Sampling(max_new_tokens=config.eval.max_new_tokens)
    has_base = config.model.weights is Weights.load
    after, before = _answer(config, run_folder, chosen, sampling, has_base)
    cut = len(exact)
    result = {
        "exact_match": {
            "before": exact_match(exact, _words(before[:cut])) if has_base else {},
            "after": exact_match(exact, _words(after[:cut])),
        },
        "samples": [
            {
                "channel": row["task_type"],
                "prompt": _as_text(_split(row)[0].messages),
                "reference": _split(row)[1],
                "before": old.shown,
                "after": new.shown,
            }
            for row, old, new in zip(samples, before[cut:], after[cut:], strict=True)
        ],
    }
    text = json.dumps(result, ensure_ascii=False, indent=1) + "\n"
    write_atomic(run_folder / "answers.json", text)
    return result


def _answer(
    config: RunConfig,
    run_folder: Path,
    rows: list[dict[str, Any]],
    sampling: Sampling,
    has_base: bool,
) -> tuple[list[Reply], list[Reply]]:
    """Answers of the export (or of base and adapter) and of the base model, if there is one.

    A model is loaded only if there is a row, and freed at the end; an adapter's base is loaded
    once. The base model is asked with the tokenizer and template of the export, and stops where
    that does: it may have no template of its own, or another one than was trained. Of an ensemble
    of prompts the first one answers.
    """
    empty = [Reply("", StopReason.end_token)] * len(rows)
    if not rows:
        return empty, empty
    from posttrain_dist.models.embeddings.added_tokens import add_rows
    from posttrain_dist.models.folder import read_added_ids, resolve

    prompts = [_split(row)[0] for row in rows]
    made = "export" if config.tuning.whole_model else "adapter"
    generator = load_generator(run_folder / made)
    after = generator.reply(prompts, sampling)
    if not has_base:
        return after, empty
    if not config.tuning.whole_model:
        return after, generator.reply(prompts, replace(sampling, adapter=BASE))
    tokenizer, end_token_ids = generator.tokenizer, generator.end_ids
    del generator
    base = resolve(config.model.path)
    generator = LocalGenerator.load(base, tokenizer=tokenizer, end_token_ids=end_token_ids)
    # As the training began: the tokenizer of the export has them.
    add_rows(generator.model, read_added_ids(base, config.model.add_tokens))
    return after, generator.reply(prompts, sampling)


def _read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows with an answer to something; rows of plain text have no question."""
    if not path.is_file():
        raise DataError(
            "there are no held-out rows to answer",
            where=str(path),
            fix="give held-out data (data.eval, or data.eval_fraction above 0) and train again",
        )
    # Not splitlines(): a JSON string may hold other characters that end a line for Python.
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
    return [
        row for row in rows if any(m["role"] == "assistant" for m in row.get("messages", ())[1:])
    ]


def _exact_rows(rows: list[dict[str, Any]], per_channel: int) -> list[dict[str, Any]]:
    by_channel: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if row.get("check") == "exact":
            by_channel.setdefault(row["task_type"], []).append(row)
    return [row for group in by_channel.values() for row in group[:per_channel]]


def _sample_rows(rows: list[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """The first row of each open channel, then the second of each, and so on."""
    ranked: list[tuple[int, dict[str, Any]]] = []
    seen: dict[str, int] = {}
    for row in rows:
        if row.get("check") is None:
            turn = seen.get(row["task_type"], 0)
            seen[row["task_type"]] = turn + 1
            ranked.append((turn, row))
    return [row for _, row in sorted(ranked, key=lambda pair: pair[0])[:count]]


def _split(row: dict[str, Any]) -> tuple[Prompt, str]:
    """The turns before the last assistant turn, and that turn's text."""
    messages = row["messages"]
    last = max(i for i, message in enumerate(messages) if message["role"] == "assistant")
    variables = row.get("chat_template_kwargs", {})
    prompt = Prompt(messages[:last], row.get("tools", ()), variables)
    return prompt, messages[last].get("content") or ""


def _as_text(messages: Sequence[Message]) -> str:
    texts = [str(message.get("content") or "") for message in messages]
    if len(messages) == 1:
        return texts[0]
    return "\n".join(f"{m['role']}: {text}" for m, text in zip(messages, texts, strict=True))
