"""What every arm of step.py trains on: a random Llama in a folder, and the samples of each step.

Tokens follow Zipf's law, so that the loss falls in 20 steps. Samples are sorted by length within
their step, which no arm of ours needs and which spares padding where a peer cuts its micro-batches
in order.
"""

from __future__ import annotations

import gc
import json
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

IGNORED = -100
MAX_LENGTH = 1024  # of a sample: TRL's default


@dataclass(slots=True, kw_only=True)
class Sizes:
    """A Llama, and the samples of one optimizer step."""

    hidden: int = 384
    layers: int = 6
    feed_forward: int = 1024
    heads: int = 6
    kv_heads: int = 6
    vocabulary: int = 16_000
    tied: bool = False  # output and input embedding
    dtype: str = "float32"  # of the weights in the folder
    lora_rank: int = 0  # 0: every weight is trained
    checkpoint_layers: int = 0  # of ours, whose activations are computed again
    pack_tokens: int = MAX_LENGTH  # of ours, a micro-batch
    samples: int = 8  # of an optimizer step; TRL's default batch, or a multiple of it
    mean_log_length: float = 5.0  # lognormal, in tokens
    uniform_length: int = 256
    channels: int = 8
    learning_rate: float = 1e-3


@dataclass(slots=True, kw_only=True)
class Sample:
    """One row: what TRL calls input_ids and labels, and the task that it is of."""

    input_ids: list[int]
    labels: list[int]  # -100 where masked
    channel: int


def make_steps(sizes: Sizes, kind: str, steps: int, seed: int = 0) -> list[list[Sample]]:
    """`steps` lists of samples: "mixed" (lognormal lengths, 70 % masked) or "uniform" (none)."""
    draw = np.random.default_rng(seed)
    made = []
    for _ in range(steps):
        if kind == "mixed":
            drawn = np.exp(draw.normal(sizes.mean_log_length, 0.9, sizes.samples))
            lengths = np.clip(drawn.astype(int), 8, MAX_LENGTH)
        else:
            lengths = np.full(sizes.samples, sizes.uniform_length)
        samples = []
        for length in sorted(lengths.tolist(), reverse=True):
            ids = np.minimum(draw.zipf(1.2, length), sizes.vocabulary - 1).tolist()
            masked = round(0.7 * length) if kind == "mixed" else 0
            labels = [IGNORED] * masked + ids[masked:]
            samples.append(
                Sample(input_ids=ids, labels=labels, channel=int(draw.integers(sizes.channels)))
            )
        made.append(samples)
    return made


def counts(steps: list[list[Sample]]) -> dict[str, float]:
    """Tokens, supervised share, and tokens that padding to the longest of a step would make."""
    lengths = [[len(s.input_ids) for s in samples] for samples in steps]
    tokens = sum(map(sum, lengths))
    # The first token of a sample is no target.
    supervised = sum(sum(x != IGNORED for x in s.labels[1:]) for step in steps for s in step)
    padded = sum(len(row) * max(row) for row in lengths)
    return {
        "tokens_per_step": tokens / len(steps),
        "supervised_share": supervised / tokens,
        "padding_factor": padded / tokens,
    }


TINY = Sizes(
    hidden=32,
    layers=1,
    feed_forward=64,
    heads=2,
    kv_heads=2,
    vocabulary=2048,
    mean_log_length=3.0,
    uniform_length=16,
)


def write(folder: Path, sizes: Sizes, kind: str, steps: int) -> dict[str, float]:
    """Write `model/` (random weights), `steps.json` and `sizes.json` into `folder`, and `tiny/`.

    Returns:
        Parameters of the model and what `counts` says.
    """
    tiny = replace(TINY, lora_rank=sizes.lora_rank)
    write_model(folder / "tiny", tiny)
    write_steps(folder / "tiny", tiny, kind, 2)
    return {"parameters": write_model(folder, sizes), **write_steps(folder, sizes, kind, steps)}


def llama_config(sizes: Sizes) -> Any:
    """transformers' LlamaConfig."""
    from transformers import LlamaConfig

    return LlamaConfig(
        hidden_size=sizes.hidden,
        num_hidden_layers=sizes.layers,
        intermediate_size=sizes.feed_forward,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.kv_heads,
        vocab_size=sizes.vocabulary,
        max_position_embeddings=MAX_LENGTH,
        tie_word_embeddings=sizes.tied,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=1,
    )


def write_model(folder: Path, sizes: Sizes) -> int:
    """Write `model/` and `sizes.json`; returns the number of parameters."""
    import torch
    from transformers import AutoModelForCausalLM

    from posttrain_dist.models.folder import resolve

    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        made = AutoModelForCausalLM.from_config(
            llama_config(sizes), dtype=getattr(torch, sizes.dtype)
        )
    model = folder / "model"
    made.save_pretrained(model)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(resolve("tiny_base") / name, model / name)
    (folder / "sizes.json").write_text(json.dumps(asdict(sizes)), encoding="utf-8")
    parameters = sum(p.numel() for p in made.parameters())
    del made
    gc.collect()
    torch.cuda.empty_cache()  # for the processes that train it
    return parameters


def write_steps(folder: Path, sizes: Sizes, kind: str, steps: int) -> dict[str, float]:
    """Write `steps.json`, the samples of each step; returns what `counts` says."""
    data = make_steps(sizes, kind, steps)
    (folder / "steps.json").write_text(
        json.dumps([[asdict(s) for s in step] for step in data]), encoding="utf-8"
    )
    return counts(data)


def read(folder: Path) -> list[list[Sample]]:
    """The samples that `write_steps` wrote."""
    rows = json.loads((folder / "steps.json").read_text(encoding="utf-8"))
    return [[Sample(**sample) for sample in step] for step in rows]


def read_sizes(folder: Path) -> Sizes:
    """What `write_model` wrote."""
    return Sizes(**json.loads((folder / "sizes.json").read_text(encoding="utf-8")))


def lora(rank: int) -> Any:
    """peft's LoraConfig: all projections of all layers."""
    from peft import LoraConfig

    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    return LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=names)
