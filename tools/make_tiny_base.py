"""Make what the small base model starts from: `python tools/make_tiny_base.py OUT`.

Writes OUT/pretrain.jsonl (about 6M tokens), the tokenizer and a fresh Llama config without
weights; `posttrain train experiment=tiny_base` trains the weights. Three parts, all without any
held-out row:
    library  the standard library's functions, classes and module docstrings
    drill    the fixed-answer skills written out plainly, never as chat
    chat     the chat format on easy other requests: repeat, first, last
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path

import stdlib_text
from embedded_heldout import contains_heldout, heldout
from skills import FIELDS, FIXED, LETTERS, Question, draw
from tiny_tokenizer import END, train_tokenizer

MAX_LENGTH = 1024  # tokens that the model can read
NUM_DRILLS = 28_000
NUM_CHATS = 6_000
LONGEST_TEXT = 700  # characters of one library document
# Deep enough to look up, copy and compare (five layers); narrow enough for minutes on two cores.
MODEL = {
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 5,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 32,
    "rope_theta": 10_000.0,
    "tie_word_embeddings": True,
    "max_position_embeddings": MAX_LENGTH,
}

# ---------------------------------------------------------------------------------- texts


def drill(rng: random.Random) -> str:
    """A worked list: some questions of one task, or of several, in plain form."""
    tasks = [rng.choice(FIXED)] if rng.random() < 0.8 else list(FIXED)
    lines: list[str] = []
    while len(lines) < 8:
        question = draw(rng.choice(tasks), rng)
        if not contains_heldout(question.given) and not contains_heldout(question.plain):
            lines.append(_line(question, rng))
    return "\n".join(lines)


def _line(question: Question, rng: random.Random) -> str:
    if question.task == "arithmetic" and rng.random() < 0.2:
        return f">>> {question.given}\n{question.answer}"
    if question.task == "extract" and rng.random() < 0.2:
        return f"{question.given} ({question.asked}: {question.answer})"
    return question.plain


def chat(rng: random.Random) -> str:
    """A dialogue of one to three easy requests; none is a task of the embedded data set."""
    turns = []
    for _ in range(rng.randrange(1, 4)):
        user, assistant = _request(rng)
        turns.append(f"<|user|>{user}{END}<|assistant|>{assistant}{END}")
    return "".join(turns)


def _request(rng: random.Random) -> tuple[str, str]:
    row = rng.sample(LETTERS, rng.randrange(3, 7))
    field = rng.choice(sorted(FIELDS))
    value = rng.choice(FIELDS[field])
    number = "".join(rng.sample("0123456789", rng.randrange(2, 6)))
    return rng.choice(
        [
            (f"Repeat the letters: {' '.join(row)}", " ".join(row)),
            (f"First letter of: {' '.join(row)}", row[0]),
            (f"Last letter of: {' '.join(row)}", row[-1]),
            (f"Repeat the digits: {number}", number),
            (f"Repeat the record: {field}={value}", f"{field}={value}"),
            (f"Say hello to {rng.choice(FIELDS['name'])}.", "Hello!"),
        ]
    )


def library() -> Iterator[str]:
    """Functions with their docstring in place or as a comment below, classes, module prose."""
    kept_out = heldout().code
    for source, tree in stdlib_text.modules():
        for text in stdlib_text.paragraphs(tree):
            yield text[:LONGEST_TEXT]
        for item in stdlib_text.documented(source, tree):
            if item.code in kept_out or not item.summary:
                continue
            if len(item.source) <= LONGEST_TEXT:
                yield item.source
            if len(item.code) <= LONGEST_TEXT // 2:
                yield f"{item.code}\n# {item.summary}"


def rows(seed: int = 0, share: float = 1.0) -> Iterator[dict[str, str]]:
    """The pretraining rows; `share` below 1 makes a sample of the generated parts."""
    for name, make, count in (("drill", drill, NUM_DRILLS), ("chat", chat, NUM_CHATS)):
        rng = random.Random(f"pretrain:{name}:{seed}")
        for _ in range(round(count * share)):
            yield {"text": make(rng), "task_type": name}
    for text in library():
        yield {"text": text, "task_type": "library"}


def clean_rows(seed: int = 0, share: float = 1.0) -> list[dict[str, str]]:
    """The rows without repetition and without any held-out row, in mixed order."""
    seen: set[str] = set()
    kept = []
    for row in rows(seed, share):
        if row["text"] not in seen and not contains_heldout(row["text"]):
            seen.add(row["text"])
            kept.append(row)
    random.Random(f"pretrain:order:{seed}").shuffle(kept)
    return kept


# ---------------------------------------------------------------------------------- files


def write(folder: Path) -> None:
    """Write config, tokenizer and pretrain.jsonl into `folder`."""
    from transformers import GenerationConfig, LlamaConfig

    folder.mkdir(parents=True, exist_ok=True)
    kept = clean_rows()
    with (folder / "pretrain.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in kept)
    tokenizer = train_tokenizer((row["text"] for row in kept), MAX_LENGTH)
    tokenizer.save_pretrained(folder)
    tokens = {
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": None,
    }
    config = LlamaConfig(vocab_size=len(tokenizer), **MODEL, **tokens)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    GenerationConfig(do_sample=False, **tokens).save_pretrained(folder)
    print(f"{len(kept)} rows, {sum(len(row['text']) for row in kept)} characters in {folder}")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("usage: python tools/make_tiny_base.py OUT")
    write(Path(sys.argv[1]))
