"""The shapes of index.yaml: templates with their tokenizers (loaded by path: tests/ is no package).

A tokenizer is a small byte-level BPE with the shape's own tokens. Its pre-tokenizer keeps line
breaks together, as those of Llama 3 and Qwen do, so that an answer may merge with its prompt.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import yaml

FOLDER = Path(__file__).parent
_SPLIT = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_TRAINED_ON = ["the user asks the assistant a question and it says hello", "\n\n \n\n"] * 3


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A template, or several by name, with what its tokenizer and its rows need."""

    name: str
    eos: str
    bos: str | None = None
    files: dict[str, str] = field(default_factory=dict)
    special: list[str] = field(default_factory=list)
    strips: list[str] = field(default_factory=list)
    added: list[str] = field(default_factory=list)
    ends: list[str] = field(default_factory=list)
    stops: list[str] = field(default_factory=list)
    variables: dict[str, Any] = field(default_factory=dict)
    thinks: list[list[str]] = field(default_factory=lambda: [["<think>", "</think>"]])
    thoughts: str = "reasoning_content"
    arguments: str = "object"
    call_id: str = "call{index:05}"
    notes: str = ""

    @property
    def title(self) -> str:
        """The name, with the variables."""
        given = ", ".join(f"{name}={value}" for name, value in self.variables.items())
        return f"{self.name} ({given})" if given else self.name

    def tokenizer(self) -> Any:
        """Its tokenizer, with its templates."""
        return _tokenizer(self.name)

    def as_read(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Messages with thoughts and arguments where, and as what, the template looks for them."""
        return [self._as_read(message) for message in messages]

    def _as_read(self, message: dict[str, Any]) -> dict[str, Any]:
        read = dict(message)
        if "reasoning_content" in read:
            read[self.thoughts] = read.pop("reasoning_content")
        if self.arguments == "text" and "tool_calls" in read:
            read["tool_calls"] = [_with_text(call) for call in read["tool_calls"]]
        return read


def read_shapes() -> list[Shape]:
    """Every shape, once with each of its sets of variables."""
    found = []
    for name, entry in _entries().items():
        given = {key: value for key, value in entry.items() if key != "variables"}
        given = {"ends": [entry["eos"]], **given, "name": name}
        found += [Shape(**given, variables=v) for v in ({}, *entry.get("variables", ()))]
    return found


@cache
def _entries() -> dict[str, dict[str, Any]]:
    return dict(yaml.safe_load((FOLDER / "index.yaml").read_text(encoding="utf-8")))


@cache
def _blank() -> str:
    """The tokenizer that all shapes share, as JSON."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(_TRAINED_ON, trainer)
    return str(inner.to_str())


@cache
def _tokenizer(name: str) -> Any:
    from tokenizers import AddedToken, Tokenizer
    from transformers import PreTrainedTokenizerFast

    shape = Shape(**{**_entries()[name], "name": name, "variables": {}})
    inner = Tokenizer.from_str(_blank())
    special = [*([shape.bos] if shape.bos else []), shape.eos, *shape.special, "<|pad|>"]
    inner.add_special_tokens(
        [AddedToken(text, normalized=False, rstrip=text in shape.strips) for text in special]
    )
    inner.add_tokens([AddedToken(text, special=False, normalized=False) for text in shape.added])
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        **({"bos_token": shape.bos} if shape.bos else {}),
        eos_token=shape.eos,
        pad_token="<|pad|>",
        extra_special_tokens=shape.special,
    )
    sources = {
        variant: (FOLDER / f"{file}.jinja").read_text(encoding="utf-8")
        for variant, file in (shape.files or {"": name}).items()
    }
    wrapped.chat_template = sources.get("") or sources
    return wrapped


def _with_text(call: dict[str, Any]) -> dict[str, Any]:
    text = json.dumps(call["function"]["arguments"], ensure_ascii=False)
    return {**call, "function": {**call["function"], "arguments": text}}
