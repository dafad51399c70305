"""Small templates of several kinds, and what comes of a conversation under them.

For several tests, which load it by its path: tests/ is no package.
"""

from __future__ import annotations

from typing import Any

from posttrain_dist.data import Template
from posttrain_dist.data.chat.encoder import Encoder, RowExamples
from posttrain_dist.flow import Record

START, END, PAD = "<|start|>", "<|end|>", "<|pad|>"
HEADER = "{{ '<|start|>' + m.role + '\n' }}"
ASKED = "{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"
CHATML = "{% for m in messages %}" + HEADER + "{{ m.content + '<|end|>\n' }}{% endfor %}" + ASKED
# As Qwen3: thoughts behind the last question only, an empty block where there are none.
HYBRID = (
    "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}{% for m in messages %}" + HEADER + ""
    "{% if m.role == 'assistant' and loop.index0 > ns.last %}"
    "{{ '<think>\n' + (m.reasoning_content or '') + '\n</think>\n\n' }}{% endif %}"
    "{{ m.content + '<|end|>\n' }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start|>assistant\n' }}{% if enable_thinking is defined and not enable_thinking %}"
    "{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)
# As the distilled R1: the prompt opens thoughts, and they are cut out of every turn.
CUTS = (
    "{% for m in messages %}" + HEADER + "{{ m.content.split('</think>')[-1].lstrip('\n') }}"
    "{{ '<|end|>' }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start|>assistant\n<think>\n' }}{% endif %}"
)
ASK, MORE = {"role": "user", "content": "Hi"}, {"role": "user", "content": "More"}


def say(content: str, thoughts: str = "") -> dict[str, Any]:
    beside = {"reasoning_content": thoughts} if thoughts else {}
    return {"role": "assistant", "content": content, **beside}


def encode(
    tokenizer: Any,
    *messages: dict[str, Any],
    ends: tuple[str, ...] = (),
    row: dict[str, Any] | None = None,
    **choice: Any,
) -> RowExamples:
    record = Record(channel="c", where="rows.jsonl:7", messages=messages, **(row or {}))
    return Encoder(tokenizer, Template(**choice), max_length=999, ends=ends).encode(record)


def parts(tokenizer: Any, row: RowExamples) -> list[tuple[str, str]]:
    """Of each sample: what stands before the first target, and the targets."""
    found = []
    for example in row.examples:
        first = int((example.weight_L > 0).argmax())
        ids, weights = example.input_ids_L.tolist(), example.weight_L[first:]
        said = [token for token, weight in zip(ids[first:], weights, strict=True) if weight]
        found.append((tokenizer.decode(ids[:first]), tokenizer.decode(said)))
    return found


def prompts(tokenizer: Any, *conversations: list[dict[str, Any]], **variables: Any) -> list[str]:
    return [
        tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, **variables
        )
        for messages in conversations
    ]
