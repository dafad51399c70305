"""Which special tokens have a metric of their own, and under which name. Imports no torch."""

from __future__ import annotations

import re
from typing import Any

MAX_TOKENS = 64  # metrics that a run's pages can still show

# Words of a token's name that say that it opens or closes something.
_WORDS = (
    "im|eot|eom|eod|end|start|turn|header|user|assistant|system|developer|model|human|observation|"
    "role|message|channel|think|thinking|thought|reasoning|inst|sys|"
    "tool|tools|call|calls|function|functions|response|responses|result|results|output|outputs|"
    "python_tag|ipython|eos|endoftext|return"
)
_KNOWN = re.compile(rf"(?:^|[^a-z])(?:{_WORDS})(?:$|[^a-z])", re.IGNORECASE)
# Placeholders of a vocabulary, pictures and sound, filling in the middle: never a target of text.
_NEVER = re.compile(
    r"reserved|unused|placeholder|dummy|control_\d|extra_id|image|img|vision|video|audio|patch|"
    r"box|quad|object_ref|fim|prefix|suffix|middle|repo|file|mask",
    re.IGNORECASE,
)


def special_tokens(tokenizer: Any, template: str | None = None) -> dict[int, str]:
    """Token id -> name for a metric, of the special tokens that can be targets; ids ascending.

    Chosen are the end token, every added token that the chat template writes literally, and those
    whose name speaks of roles, turns, tools or thinking. Left out are BOS, padding and unknown
    (unless one is the end token too) and the placeholders of a vocabulary. A tag that is several
    tokens is none of these. At most 64.

    Args:
        tokenizer: a tokenizer of transformers.
        template: source of the chat template in use; None: the tokenizer's own.
    """
    source = template if template is not None else str(getattr(tokenizer, "chat_template", ""))
    end = tokenizer.eos_token_id
    others = (tokenizer.bos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id)
    chosen = {}
    for token_id, token in sorted(tokenizer.added_tokens_decoder.items()):
        text = str(token)
        if token_id == end:
            chosen[token_id] = text
        elif token_id in others or not text.strip() or _NEVER.search(text):
            continue
        elif _KNOWN.search(_plain(text)) or (len(text.strip()) > 1 and text in source):
            chosen[token_id] = text
    if end is not None and end not in chosen:  # an end token that is a plain vocabulary entry
        chosen[end] = str(tokenizer.eos_token)
    # The end token first, so that the limit never cuts it.
    kept = sorted(sorted(chosen, key=lambda token_id: (token_id != end, token_id))[:MAX_TOKENS])
    return _distinct({token_id: metric_name(chosen[token_id]) for token_id in kept})


def metric_name(token: str) -> str:
    """`im_end` for `<|im_end|>`, `end_think` for `</think>`: letters, digits, `_`, `.`, `-`."""
    text = _plain(token)
    closing = text.startswith("/")
    name = re.sub(r"[^A-Za-z0-9_.-]+", "_", text).strip("_.-")[:40]
    return f"end_{name}" if closing and name else name


def _plain(token: str) -> str:
    """Without brackets, bars (also full-width ones) and the marks that stand for a space."""
    return re.sub(r"[\u2581\u0120]", "_", token).strip(" \t\r\n<>[](){}|\uff5c\u2758")


def _distinct(names: dict[int, str]) -> dict[int, str]:
    taken: set[str] = set()
    found = {}
    for token_id, name in names.items():
        name = name or f"token_{token_id}"
        if name in taken:
            name = f"{name}_{token_id}"
        taken.add(name)
        found[token_id] = name
    return found
