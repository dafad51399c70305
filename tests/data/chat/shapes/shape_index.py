"""The shapes of index.yaml: templates with their tokenizers (loaded by path: tests/ is no package).

A tokenizer is a small byte-level BPE with the shape's own tokens. Its pre-tokenizer keeps line
breaks together, as those of Llama 3 and Qwen do, so that an answer may merge with its prompt. With
`spaces` it is one as sentencepiece makes them, which puts a space before a text.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
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
    spaces: str = ""
    added: list[str] = field(default_factory=list)
    ends: list[str] = field(default_factory=list)
    stops: list[str] = field(default_factory=list)
    variables: dict[str, Any] = field(default_factory=dict)
    choice: dict[str, str] = field(default_factory=dict)
    thinks: list[list[str]] = field(default_factory=lambda: [["<think>", "</think>"]])
    thoughts: str = "reasoning_content"
    arguments: str = "object"
    call_id: str = "call{index:05}"
    notes: str = ""

    @property
    def title(self) -> str:
        """The name, with the variables and options."""
        given = ", ".join(f"{k}={v}" for k, v in {**self.variables, **self.choice}.items())
        return f"{self.name} ({given})" if given else self.name

    def tokenizer(self) -> Any:
        """Its tokenizer, with its templates."""
        return _tokenizer(self.name)

    def as_read(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Messages with thoughts and arguments where, and as what, the template looks for them.

        Thoughts that the options take out are gone.
        """
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        kept = {"none": [], "last": turns[-1:]}.get(self.choice.get("thinking", ""), turns)
        return [
            self._as_read(message if i in kept else self._without_thoughts(message))
            for i, message in enumerate(messages)
        ]

    def _without_thoughts(self, message: dict[str, Any]) -> dict[str, Any]:
        left = {key: value for key, value in message.items() if key != "reasoning_content"}
        for _, closes in self.thinks if left["role"] == "assistant" else ():
            _, closed, behind = left["content"].rpartition(closes)
            left["content"] = behind.lstrip() if closed else left["content"]
        return left

    def _as_read(self, message: dict[str, Any]) -> dict[str, Any]:
        read = dict(message)
        if "reasoning_content" in read:
            read[self.thoughts] = read.pop("reasoning_content")
        if self.arguments == "text" and "tool_calls" in read:
            read["tool_calls"] = [_with_text(call) for call in read["tool_calls"]]
        return read


def read_shapes() -> list[Shape]:
    """Every shape, once more with each of its sets of variables and each of its options."""
    found = []
    for name, entry in _entries().items():
        plain = _plain(name)
        found.append(plain)
        found += [replace(plain, variables=each) for each in entry.get("variables", ())]
        found += [replace(plain, choice=each) for each in entry.get("choices", ())]
    return found


def _plain(name: str) -> Shape:
    entry = _entries()[name]
    given = {key: value for key, value in entry.items() if key not in ("variables", "choices")}
    return Shape(**{"ends": [entry["eos"]], **given, "name": name})


@cache
def _entries() -> dict[str, dict[str, Any]]:
    return dict(yaml.safe_load((FOLDER / "index.yaml").read_text(encoding="utf-8")))


@cache
def _blank(spaces: str) -> str:
    """The tokenizer that shapes share, as JSON; `spaces`: one that puts spaces in front."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    bytes_alone = [f"<0x{byte:02X}>" for byte in range(256)]
    if spaces:
        inner = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
        inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=spaces, split=False)
        inner.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        )
    else:
        inner = Tokenizer(models.BPE())
        split = pre_tokenizers.Split(Regex(_SPLIT), "isolated")
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        inner.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
        inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<unk>", *bytes_alone] if spaces else [],
        initial_alphabet=[] if spaces else pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(_TRAINED_ON, trainer)
    described = json.loads(inner.to_str())
    described["added_tokens"] = described["added_tokens"][: 1 if spaces else 0]
    return json.dumps(described)


@cache
def _tokenizer(name: str) -> Any:
    from tokenizers import AddedToken, Tokenizer
    from transformers import PreTrainedTokenizerFast

    shape = _plain(name)
    inner = Tokenizer.from_str(_blank(shape.spaces))
    special = [*([shape.bos] if shape.bos else []), shape.eos, *shape.special, "<|pad|>"]
    inner.add_special_tokens(
        [AddedToken(text, normalized=False, rstrip=text in shape.strips) for text in special]
    )
    inner.add_tokens([AddedToken(text, special=False, normalized=False) for text in shape.added])
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        **({"bos_token": shape.bos} if shape.bos else {}),
        **({"unk_token": "<unk>"} if shape.spaces else {}),
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
