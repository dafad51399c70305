"""Small tokenizers with the special tokens of each family of chat templates."""
# ruff: noqa: RUF001 - DeepSeek writes its tokens with a full-width bar

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

_TAGS = [
    *("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"),
]
# Family -> (BOS, EOS, other special tokens, added tokens that are not called special).
FAMILIES: dict[str, tuple[str | None, str, list[str], list[str]]] = {
    "chatml": (None, "<|im_end|>", ["<|im_start|>"], []),
    "qwen": (None, "<|im_end|>", ["<|im_start|>"], ["<think>", "</think>", "<tool_call>"]),
    "llama2": ("<s>", "</s>", ["<unk>"], []),
    "llama3": (
        "<|begin_of_text|>",
        "<|eot_id|>",
        ["<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>"],
        [],
    ),
    "mistral": (
        "<s>",
        "</s>",
        [
            *("[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"),
            *("[TOOL_RESULTS]", "[/TOOL_RESULTS]"),
        ],
        [],
    ),
    "gemma": ("<bos>", "<eos>", ["<start_of_turn>", "<end_of_turn>"], ["\n\n"]),
    "phi": (None, "<|endoftext|>", ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"], []),
    "zephyr": ("<s>", "</s>", ["<unk>"], []),
    "deepseek": (
        "<｜begin▁of▁sentence｜>",
        "<｜end▁of▁sentence｜>",
        [],
        ["<｜User｜>", "<｜Assistant｜>"],
    ),
    "r1": (
        "<｜begin▁of▁sentence｜>",
        "<｜end▁of▁sentence｜>",
        [],
        ["<｜User｜>", "<｜Assistant｜>", *_TAGS[:2]],
    ),
    "qwen3.5": (None, "<|im_end|>", ["<|im_start|>"], _TAGS),
    "phi4": (None, "<|im_end|>", ["<|im_start|>", "<|im_sep|>"], []),
    "granite": (None, "<|end_of_text|>", ["<|start_of_role|>", "<|end_of_role|>"], _TAGS[2:]),
    "glm": (
        None,
        "<|endoftext|>",
        ["[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"],
        [*_TAGS, "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"],
    ),
    "cohere": (
        "<BOS_TOKEN>",
        "<|END_OF_TURN_TOKEN|>",
        [
            *("<|START_OF_TURN_TOKEN|>", "<|SYSTEM_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>"),
            *("<|START_RESPONSE|>", "<|END_RESPONSE|>", "<|START_THINKING|>", "<|END_THINKING|>"),
            *("<|START_ACTION|>", "<|END_ACTION|>", "<|START_TOOL_RESULT|>", "<|END_TOOL_RESULT|>"),
        ],
        [],
    ),
    "gemma4": (
        "<bos>",
        "<eos>",
        [
            *("<|turn>", "<turn|>", "<|channel>", "<channel|>", "<|think|>", '<|"|>', "<|tool>"),
            *("<tool|>", "<|tool_call>", "<tool_call|>", "<|tool_response>", "<tool_response|>"),
        ],
        [],
    ),
    "gpt-oss": (
        "<|startoftext|>",
        "<|return|>",
        ["<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|constrain|>", "<|call|>"],
        [],
    ),
}
# Line breaks stay together whatever follows, as in the tokenizers of Llama 3 and Qwen.
SPLIT = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
TRAINED_ON = "the user asks the assistant a question and it says hello system model be kind"


def build(
    bos: str | None,
    eos: str,
    special: list[str],
    added: list[str],
    template: str | None = None,
    trim_offsets: bool = False,
    strips: bool = False,
    split: bool = False,
    metaspace: str | None = None,
) -> Any:
    from tokenizers import (
        AddedToken,
        Regex,
        Tokenizer,
        decoders,
        models,
        pre_tokenizers,
        processors,
        trainers,
    )
    from transformers import PreTrainedTokenizerFast

    special = [*special, "<unk>"] if metaspace else special
    inner = Tokenizer(models.BPE(unk_token="<unk>") if metaspace else models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not split)
    splitter = [pre_tokenizers.Split(Regex(SPLIT), "isolated")] if split else []
    inner.pre_tokenizer = pre_tokenizers.Sequence([*splitter, byte_level])
    inner.decoder = decoders.ByteLevel()
    if metaspace:  # as sentencepiece: "first" or "always" says where a space is put in front
        inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=metaspace, split=False)
    if trim_offsets:
        inner.post_processor = processors.ByteLevel(trim_offsets=True)
    names = [*([bos] if bos else []), eos, *special, "<|pad|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400 + len(names),
        special_tokens=[AddedToken(n, rstrip=strips, normalized=False) for n in names],
        initial_alphabet=[] if metaspace else pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    words = ["assistant", "user", "system", "hello"] * 5
    inner.train_from_iterator([TRAINED_ON, TRAINED_ON, *words, "\n\n \n\n"], trainer)
    inner.add_tokens([AddedToken(n, special=False, normalized=False) for n in added])
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        **({"bos_token": bos} if bos else {}),
        **({"unk_token": "<unk>"} if metaspace else {}),
        eos_token=eos,
        pad_token="<|pad|>",
        extra_special_tokens=special,
    )
    wrapped.chat_template = template
    return wrapped


@pytest.fixture(scope="session")
def tokenizer_of() -> Callable[..., Any]:
    """A tokenizer with a chat template: `<|bos|> <|start|> <|end|>` are its special tokens."""

    def make(template: str | None, **options: Any) -> Any:
        return build("<|bos|>", "<|end|>", ["<|start|>"], [], template, **options)

    return make


@pytest.fixture(scope="session")
def family_tokenizer() -> Callable[..., Any]:
    """The tokenizer of a family; `template` is that of the tokenizer itself."""

    def make(family: str, template: str | None = None, **options: Any) -> Any:
        return build(*FAMILIES[family], template, split=True, **options)

    return make
