"""What every arm of step.py trains on: a random Llama in a folder, and the samples of each step.

Tokens follow Zipf's law, so that the loss falls in 20 steps. Samples are sorted by length within
their step, which no arm of ours needs and which spares padding where a peer cuts its micro-batches
in order.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

IGNORED = -100
MAX_LENGTH = 1024  # TRL's default, and our pack


@dataclass(slots=True, kw_only=True)
class Sizes:
    """A Llama, and the samples of one optimizer step."""

    hidden: int = 384
    layers: int = 6
    feed_forward: int = 1024
    heads: int = 6
    vocabulary: int = 16_000
    samples: int = 8  # of an optimizer step; TRL's default batch
    mean_log_length: float = 5.0  # lognormal, in tokens
    uniform_length: int = 256
    channels: int = 8


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
    # The first token of a sample is nobody's target.
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
    vocabulary=2048,
    mean_log_length=3.0,
    uniform_length=16,
)


def write(folder: Path, sizes: Sizes, kind: str, steps: int) -> dict[str, float]:
    """Write `model/` (random weights, float32) and `steps.json` into `folder`, and a `tiny/` one.

    Returns:
        Parameters of the model and what `counts` says.
    """
    _write(folder / "tiny", TINY, kind, 2)
    return _write(folder, sizes, kind, steps)


def _write(folder: Path, sizes: Sizes, kind: str, steps: int) -> dict[str, float]:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from posttrain_dist.models.folder import resolve

    model = folder / "model"
    config = LlamaConfig(
        hidden_size=sizes.hidden,
        num_hidden_layers=sizes.layers,
        intermediate_size=sizes.feed_forward,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.heads,
        vocab_size=sizes.vocabulary,
        max_position_embeddings=MAX_LENGTH,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=1,
    )
    torch.manual_seed(0)
    made = LlamaForCausalLM(config)
    made.save_pretrained(model)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(resolve("tiny_base") / name, model / name)
    data = make_steps(sizes, kind, steps)
    (folder / "steps.json").write_text(json.dumps([[asdict(s) for s in step] for step in data]))
    parameters = sum(p.numel() for p in made.parameters())
    return {"parameters": parameters, **counts(data)}


def read(folder: Path) -> list[list[Sample]]:
    """What `write` wrote."""
    rows = json.loads((folder / "steps.json").read_text())
    return [[Sample(**sample) for sample in step] for step in rows]
