"""Answers by plain Hugging Face generation: batches for evaluation, a stream for chat.

prepared/heldout_records.jsonl -> choose -> generate (base, export) -> answers.json
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain_dist.config import RunConfig
from posttrain_dist.errors import DataError, ModelError
from posttrain_dist.files import write_atomic
from posttrain_dist.models import Weights

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Message = dict[str, str]


def load(folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model and tokenizer of a Hugging Face folder, ready for greedy generation.

    The model runs on the GPU in its own dtype if there is one, else on the CPU in float32.

    Raises:
        ModelError: the folder holds no model that transformers can load.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
    from transformers.utils.logging import disable_progress_bar

    if not (folder / "config.json").is_file():
        raise ModelError(
            "holds no model (there is no config.json)",
            where=str(folder),
            fix="give a Hugging Face folder; `posttrain export RUN` writes that of a run",
        )
    disable_progress_bar()  # loading bars would stand between a chat's lines
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype="auto" if device.type == "cuda" else torch.float32
        )
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"cannot be loaded: {error}",
            where=str(folder),
            fix="check that the folder has config.json, *.safetensors and a tokenizer",
        ) from error
    if not tokenizer.chat_template:
        raise ModelError(
            "the tokenizer has no chat template, so no prompt can be made",
            where=str(folder),
            fix="add chat_template.jinja to the folder",
        )
    tokenizer.padding_side = "left"  # answers begin at the same column of every row
    ends = _end_ids(model, tokenizer)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token_id = ends[0]
    # A fresh config: the folder's own may sample or penalise repetition, and answers are
    # compared over models, so they must be greedy.
    model.generation_config = GenerationConfig(
        do_sample=False, eos_token_id=ends, pad_token_id=tokenizer.pad_token_id
    )
    return model.to(device).eval(), tokenizer


def _end_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids that end an answer: the model's own, the tokenizer's, and the template's end of turn."""
    own = getattr(model.generation_config, "eos_token_id", None)
    found = [] if own is None else [own] if isinstance(own, int) else list(own)
    if tokenizer.eos_token_id is not None:
        found.append(tokenizer.eos_token_id)
    # A base model's tokenizer often ends texts with one token and turns with another.
    marker = "posttrain-answer"
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": marker}]
    rendered = str(tokenizer.apply_chat_template(turns, tokenize=False))
    tail = rendered.rpartition(marker)[2]
    after = tokenizer(tail, add_special_tokens=False)["input_ids"] if tail else []
    if after and after[0] in tokenizer.added_tokens_decoder:
        found.append(after[0])
    if not found:
        raise ModelError(
            "neither the model, the tokenizer nor its chat template names an end-of-turn token",
            where=str(getattr(tokenizer, "name_or_path", "")),
            fix="set eos_token in tokenizer_config.json",
        )
    return sorted(set(found))


def generate(
    folder: Path, conversations: list[list[Message]], *, max_new_tokens: int, batch_size: int = 32
) -> list[str]:
    """The greedy answer to each conversation, special tokens stripped, in the given order.

    Each conversation ends with the turn to be answered (user or tool).

    Raises:
        ModelError: the folder holds no model that transformers can load.
    """
    return (
        _answer(*load(folder), conversations, max_new_tokens, batch_size) if conversations else []
    )


def _answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    conversations: list[list[Message]],
    max_new_tokens: int,
    batch_size: int,
) -> list[str]:
    import torch

    prompts = [_prompt(tokenizer, messages) for messages in conversations]
    # Like lengths together: less padding.
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    answers = [""] * len(prompts)
    for first in range(0, len(order), batch_size):
        chosen = order[first : first + batch_size]
        inputs = tokenizer(
            [prompts[index] for index in chosen],
            add_special_tokens=False,  # the template has written them
            padding=True,
            return_tensors="pt",
            return_token_type_ids=False,
        ).to(model.device)
        with torch.inference_mode():
            output_BT = model.generate(**inputs, max_new_tokens=max_new_tokens)
        new_BT = output_BT[:, inputs["input_ids"].shape[1] :]
        texts = tokenizer.batch_decode(new_BT, skip_special_tokens=True)
        for index, text in zip(chosen, texts, strict=True):
            answers[index] = text
    return answers


def _prompt(tokenizer: PreTrainedTokenizerBase, messages: list[Message]) -> str:
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


# ------------------------------------------------------------------------------------- chat


def stream_reply(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    messages: list[Message],
    max_new_tokens: int,
) -> Iterator[str]:
    """Yield the greedy reply piece by piece; closing the iterator stops the generation.

    Model and tokenizer come from `load`.
    """
    from transformers import StoppingCriteriaList, TextIteratorStreamer

    inputs = tokenizer(
        _prompt(tokenizer, messages),
        add_special_tokens=False,
        return_tensors="pt",
        return_token_type_ids=False,
    ).to(model.device)
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    closed = threading.Event()
    failures: list[BaseException] = []

    def work() -> None:
        try:
            model.generate(
                **inputs,
                max_new_tokens=max_new_tokens,
                streamer=streamer,
                stopping_criteria=StoppingCriteriaList([_StopWhen(closed)]),
            )
        except BaseException as error:  # raised again below, in the thread that reads
            failures.append(error)
            streamer.end()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        yield from (piece for piece in streamer if piece)
    finally:
        closed.set()
        thread.join()
    if failures:
        raise failures[0]


class _StopWhen:
    """A stopping criterion of transformers: every row is done once the event is set."""

    def __init__(self, event: threading.Event) -> None:
        self.event = event

    def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
        import torch

        return torch.full((input_ids.shape[0],), self.event.is_set(), device=input_ids.device)


# ------------------------------------------------------------------------------- evaluation


def exact_match(rows: list[dict[str, Any]], answers: list[str]) -> dict[str, dict[str, int]]:
    """Right answers per channel, over rows with `check == "exact"`.

    An answer is right if it equals the last assistant turn, white space at both ends aside.

    Returns:
        channel -> {"right": rows answered rightly, "of": rows asked}.
    """
    found: dict[str, dict[str, int]] = {}
    for row, answer in zip(rows, answers, strict=True):
        if row.get("check") != "exact":
            continue
        count = found.setdefault(row["task_type"], {"right": 0, "of": 0})
        count["of"] += 1
        count["right"] += answer.strip() == _split(row)[1].strip()
    return found


def compare(config: RunConfig, run_folder: Path) -> dict[str, Any]:
    """Ask held-out rows of the base model and of the run's export; write and return answers.json.

    Asked are up to `eval.generate_rows` rows of each channel with one right answer, and
    `eval.samples` rows of the other channels in turn. With `model.weights=random` there is no
    model before: its counts are absent and its answers empty.

    Raises:
        DataError: the run folder has no held-out rows.
        ModelError: base model or export cannot be loaded.
    """
    rows = _read_rows(run_folder / "prepared" / "heldout_records.jsonl")
    exact = _exact_rows(rows, config.eval.generate_rows)
    samples = _sample_rows(rows, config.eval.samples)
    asked = exact + samples
    prompts = [_split(row)[0] for row in asked]
    limit = config.eval.max_new_tokens
    after = generate(run_folder / "export", prompts, max_new_tokens=limit)
    has_base = config.model.weights is Weights.load
    before = [""] * len(asked)
    if has_base:
        from posttrain_dist.models.folder import resolve

        before = generate(resolve(config.model.path), prompts, max_new_tokens=limit)
    cut = len(exact)
    result = {
        "exact_match": {
            "before": exact_match(exact, before[:cut]) if has_base else {},
            "after": exact_match(exact, after[:cut]),
        },
        "samples": [
            {
                "channel": row["task_type"],
                "prompt": _as_text(_split(row)[0]),
                "reference": _split(row)[1],
                "before": old,
                "after": new,
            }
            for row, old, new in zip(samples, before[cut:], after[cut:], strict=True)
        ],
    }
    text = json.dumps(result, ensure_ascii=False, indent=1) + "\n"
    write_atomic(run_folder / "answers.json", text)
    return result


def _read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows with an assistant turn; rows of plain text cannot be asked."""
    if not path.is_file():
        raise DataError(
            "there are no held-out rows to ask",
            where=str(path),
            fix="give held-out data (data.eval, or data.eval_fraction above 0) and train again",
        )
    # Not splitlines(): a JSON string may hold other characters that end a line for Python.
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
    return [row for row in rows if any(m["role"] == "assistant" for m in row.get("messages", ()))]


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


def _split(row: dict[str, Any]) -> tuple[list[Message], str]:
    """The turns before the last assistant turn, and that turn's text."""
    messages = row["messages"]
    last = max(i for i, message in enumerate(messages) if message["role"] == "assistant")
    return messages[:last], messages[last]["content"]


def _as_text(messages: list[Message]) -> str:
    if len(messages) == 1:
        return messages[0]["content"]
    return "\n".join(f"{message['role']}: {message['content']}" for message in messages)
