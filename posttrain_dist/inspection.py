"""What the model will see: rows with their supervised text marked, and one packed batch."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path
from typing import Any

from posttrain_dist.config import RunConfig
from posttrain_dist.data.loader import Examples, PackedSource
from posttrain_dist.data.summary import Summary
from posttrain_dist.flow import Batch, Example
from posttrain_dist.models.folder import load_tokenizer, resolve

OPEN, CLOSE = "⟦", "⟧"
_BEFORE, _SHOWN = 8, 24  # tokens of the batch before the first target, and in all


def inspect_text(config: RunConfig, folder: Path, conversations: int = 2) -> str:
    """Prepared rows of as many channels as asked for, and the first batch, for the terminal.

    Everything shown is read back from `folder`, the arrays that are trained on.

    Raises:
        DataError: `folder` is not a prepared one.
    """
    summary = Summary.read(folder)
    examples = Examples.open(folder, "train")
    tokenizer = load_tokenizer(resolve(config.model.path))
    parts = [summary.table(), f"{OPEN}supervised text{CLOSE} is what the loss is taken on"]
    for index in _one_a_channel(examples, conversations):
        example = examples[index]
        cut = ", cut" if example.truncated else ""
        name = examples.channels[example.channel]
        head = f"── sample {example.sample_id} · {name} · {len(example.input_ids_L)} tokens{cut}"
        parts.append(f"{head}\n{mark(example, tokenizer)}")
    source = PackedSource(
        examples,
        max_length=config.data.max_length,
        window=config.data.pack_window,
        seed=config.seed,
        batch_size=1,
        micro_batch_size=1,
        rank=0,
        world=1,
    )
    parts.append(_show_batch(source.step(1)[0], examples, tokenizer))
    return "\n\n".join(parts)


def mark(example: Example, tokenizer: Any) -> str:
    """The text of a row, its supervised parts in brackets."""
    pieces = []
    pairs = zip(example.input_ids_L.tolist(), example.weight_L.tolist(), strict=True)
    for supervised, group in groupby(pairs, key=lambda pair: pair[1] > 0):
        text = tokenizer.decode([token for token, _ in group])
        pieces.append(f"{OPEN}{text}{CLOSE}" if supervised else text)
    return "".join(pieces)


def _one_a_channel(examples: Examples, wanted: int) -> list[int]:
    """First samples, each of another channel as long as there are channels left."""
    seen: dict[int, int] = {}  # channel -> samples of it so far
    order = []
    for index in range(len(examples)):
        channel = examples[index].channel
        seen[channel] = seen.get(channel, 0) + 1
        order.append((seen[channel], index))
        if len(seen) >= min(wanted, len(examples.channels)) and index >= wanted:
            break
    return [index for _, index in sorted(order)[:wanted]]


def _show_batch(batch: Batch, examples: Examples, tokenizer: Any) -> str:
    labels = dict(zip(batch.supervised_N.tolist(), batch.labels_N.tolist(), strict=True))
    channels = dict(zip(batch.supervised_N.tolist(), batch.channel_N.tolist(), strict=True))
    cu = batch.cu_seqlens_S
    lines = [f"── first pack: {cu[-1]} tokens, {len(cu) - 1} samples, {len(labels)} supervised"]
    for sample_id, start, end in zip(batch.sample_id_S, cu, cu[1:], strict=False):
        inside = [position for position in labels if start <= position < end]
        name = examples.channels[channels[inside[0]]]
        lines.append(
            f"  tokens [{start}, {end})  sample {sample_id}  {name}  {len(inside)} targets"
        )
    first = max(0, int(batch.supervised_N[0]) - _BEFORE)
    lines.append(f"{'index':>7}  {'position':>8}  {'token':<24}  predicts")
    for i in range(first, min(first + _SHOWN, cu[-1])):
        token = repr(tokenizer.decode([int(batch.input_ids_T[i])]))
        target = repr(tokenizer.decode([labels[i]])) if i in labels else "·"
        lines.append(f"{i:>7}  {int(batch.position_ids_T[i]):>8}  {token:<24}  {target}")
    return "\n".join(lines)
