"""A tiny random Llama with one token per byte, and its greedy answers by plain forwards.

tests/ is no package, so tests load this by path.
"""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ["<|text_end|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
ENDS = {SPECIAL.index("<|text_end|>"), SPECIAL.index("<|end|>")}
CONVERSATIONS = [
    [{"role": "user", "content": "a"}],
    [{"role": "user", "content": "what is the sum of twelve and thirty?"}],
    [{"role": "system", "content": "be brief"}, {"role": "user", "content": "sort c b a"}],
    [{"role": "user", "content": "reverse: stone"}],
]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte; texts end with <|text_end|>, turns with <|end|>."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(SPECIAL + alphabet)}
    core = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(SPECIAL)
    return PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|text_end|>", chat_template=TEMPLATE
    )


def save(path: Path, **settings: object) -> Path:
    """Write a random Llama whose answers depend strongly on the prompt to `path`."""
    tokenizer = build_tokenizer()
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.6,
        bos_token_id=None,
        eos_token_id=None,
        **settings,
    )
    model = LlamaForCausalLM(config)
    # What a real folder may bring and a comparison must not use.
    model.generation_config = GenerationConfig(do_sample=True, repetition_penalty=1.9)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def prompt_ids(tokenizer: PreTrainedTokenizerFast, messages: list[dict[str, str]]) -> list[int]:
    """What the template should give, written out here."""
    text = "".join(f"<|{m['role']}|>{m['content']}<|end|>" for m in messages) + "<|assistant|>"
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def greedy(folder: Path, prompt: list[dict[str, str]] | str, steps: int) -> str:
    """The reference: argmax, one unpadded forward over the whole row per token.

    `prompt`: messages, or what a template makes of them.
    """
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = build_tokenizer()
    is_text = isinstance(prompt, str)
    ids = tokenizer(prompt)["input_ids"] if is_text else prompt_ids(tokenizer, prompt)
    start = len(ids)
    with torch.inference_mode():
        while len(ids) < start + steps:
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] in ENDS:
                break
    return tokenizer.decode(ids[start:], skip_special_tokens=True)
