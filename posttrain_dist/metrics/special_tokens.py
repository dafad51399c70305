"""Loss and accuracy of the tokens that open and close turns, tool calls and think blocks.

A model that never stops, or never closes a tool call, has a good mean loss: these tokens are few.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import torch

from posttrain_dist import dist
from posttrain_dist.flow import Batch
from posttrain_dist.metrics.channels import ChannelMeter, Tabulated

LOSS, WEIGHT, CORRECT, COUNT = range(4)  # columns of the table of special tokens
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


class SpecialTokenMeter:
    """Adds up a row (loss sum, weight, correct, count) for each watched token, on the device.

    Nothing is read back before `flush`, and shapes do not depend on the data. Reduction of every
    number: sums over ranks and steps; a mean is sum / weight.
    """

    def __init__(self, tokens: dict[int, str], device: torch.device) -> None:
        ids = sorted(tokens)
        self.names = [tokens[token_id] for token_id in ids]
        self._ids_K = torch.tensor(ids, dtype=torch.int64, device=device)
        # One row more takes in all other tokens.
        self._table = torch.zeros(len(ids) + 1, 4, dtype=torch.float64, device=device)

    def add(self, loss: Any, batch: Batch) -> None:
        """Take in one micro-batch of this rank: `nll_N` and `correct_N` of a Loss.

        An objective without losses of single tokens leaves both None, and nothing is added.
        """
        if loss.nll_N is None or loss.correct_N is None or not self.names:
            return
        device = self._table.device
        labels_N = batch.labels_N.to(device, non_blocking=True)
        weight_N = batch.weight_N.to(device, non_blocking=True).double()
        place_N = torch.searchsorted(self._ids_K, labels_N).clamp_(max=len(self.names) - 1)
        row_N = torch.where(self._ids_K[place_N] == labels_N, place_N, len(self.names))
        counted_N = weight_N > 0
        columns = (loss.nll_N * weight_N, weight_N, loss.correct_N & counted_N, counted_N)
        values_N4 = torch.stack([column.double() for column in columns], dim=1)
        self._table.index_add_(0, row_N, values_N4)

    def flush(self) -> torch.Tensor:
        """Global table [K, 4] (float64, CPU) since the last flush; collective."""
        table_K4 = dist.all_sum(self._table[:-1].clone()).cpu()
        self._table.zero_()
        return table_K4


class Tables(NamedTuple):
    """What a TokenMeter has summed: float64, on the CPU."""

    channels_CK: torch.Tensor
    special_tokens: torch.Tensor  # [watched tokens, 4]


class TokenMeter:
    """A ChannelMeter and a SpecialTokenMeter as one meter.

    Args:
        channels: names of the channels.
        tokens: what `special_tokens` gave.
        objective: whose tables are summed.
    """

    def __init__(
        self,
        channels: list[str],
        tokens: dict[int, str],
        objective: Tabulated,
        device: torch.device,
    ) -> None:
        self._channels = ChannelMeter(channels, objective, device)
        self._special = SpecialTokenMeter(tokens, device)

    def add(self, loss: Any, batch: Batch) -> None:
        """Take in one micro-batch of this rank."""
        self._channels.add(loss, batch)
        self._special.add(loss, batch)

    def flush(self) -> tuple[Tables, int]:
        """Global tables and real tokens since the last flush; collective."""
        channels_CK, tokens = self._channels.flush()
        return Tables(channels_CK, self._special.flush()), tokens

    def train_metrics(self, tables: Tables) -> dict[str, float]:
        """The metrics of a training step, from what `flush` gave."""
        special = special_token_metrics(tables.special_tokens, self._special.names)
        return {**self._channels.train_metrics(tables.channels_CK), **special}

    def eval_metrics(self, tables: Tables) -> dict[str, float]:
        """The metrics of an evaluation, from what `flush` gave."""
        special = special_token_metrics(tables.special_tokens, self._special.names, prefix="eval_")
        return {**self._channels.eval_metrics(tables.channels_CK), **special}


def special_token_metrics(
    table_K4: torch.Tensor, names: list[str], prefix: str = ""
) -> dict[str, float]:
    """`special_token_loss/<token>` and `special_token_accuracy/<token>` of those that occurred."""
    metrics = {}
    for name, row in zip(names, table_K4.tolist(), strict=True):
        if row[WEIGHT] > 0:
            metrics[f"{prefix}special_token_loss/{name}"] = row[LOSS] / row[WEIGHT]
            metrics[f"{prefix}special_token_accuracy/{name}"] = row[CORRECT] / row[COUNT]
    return metrics
