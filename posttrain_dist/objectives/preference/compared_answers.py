"""What preference objectives share: the answers of a batch, and which is better than which.

Which samples are compared is read off the host's copy of their fields, so that no device is waited
for; sums are taken in float64, in which a sum over a long answer loses nothing.

Letters beside those of flow.py: P comparisons of the batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch

from posttrain_dist.flow import Batch, Column

ANSWER, OTHER = 0, 1  # of `role_S`: an answer to the prompt, and one to another prompt


class Comparison(NamedTuple):
    """Two samples of one unit, of which the first is preferred."""

    better: int
    worse: int
    weight: float  # 1 / comparisons of the unit: a ranking counts as much as a pair


class Comparisons(NamedTuple):
    """The comparisons of a batch on its device."""

    better_P: torch.Tensor  # int64, samples
    worse_P: torch.Tensor  # int64
    weight_P: torch.Tensor  # float64
    margin_P: torch.Tensor  # float64, by how much at least the first is to be preferred


class Answers(NamedTuple):
    """The samples of a batch as sums over their tokens; 0 of a sample without targets."""

    logprob_S: torch.Tensor  # float64, log p, with gradient
    logratio_S: torch.Tensor  # float64, log p - log p of the reference; of none log p again
    tokens_S: torch.Tensor  # float64, targets; 1 at least, so that a mean can be taken

    @property
    def mean_logprob(self) -> torch.Tensor:
        """log p per token, [S]."""
        return self.logprob_S / self.tokens_S

    @property
    def mean_logratio(self) -> torch.Tensor:
        """log p - log p of the reference, per token, [S]."""
        return self.logratio_S / self.tokens_S


def comparisons_of(batch: Batch) -> list[Comparison]:
    """Every two answers to one prompt of which one is worth more."""
    value_S = batch.host_S["value_S"]
    found = []
    for samples in _units(batch):
        pairs = [(i, j) for i in samples for j in samples if value_S[i] > value_S[j]]
        found += [Comparison(i, j, 1 / len(pairs)) for i, j in pairs]
    return found


def best_answers(batch: Batch) -> list[int]:
    """The samples that no other answer of their unit is preferred to, and that beat one."""
    value_S = batch.host_S["value_S"]
    best = []
    for samples in _units(batch):
        values = [value_S[i] for i in samples]
        if min(values) < max(values):
            best += [i for i in samples if value_S[i] == max(values)]
    return best


def on_device(batch: Batch, comparisons: list[Comparison]) -> Comparisons:
    """The comparisons as tensors beside those of the batch."""
    device = batch.labels_N.device
    better, worse, weight = zip(*comparisons, strict=True) if comparisons else ((), (), ())
    better_P = host_tensor(better, torch.int64, device)
    margin_S = batch.extra["margin_S"].double()
    return Comparisons(
        better_P,
        host_tensor(worse, torch.int64, device),
        host_tensor(weight, torch.float64, device),
        margin_S[better_P],
    )


def answers_of(batch: Batch, logprob_N: torch.Tensor, reference_N: torch.Tensor | None) -> Answers:
    """Sums of log p over each sample's tokens.

    The reference is subtracted token by token, before anything is added up: equal models give a
    ratio of exactly 0.

    Args:
        logprob_N: log p of each target, with gradient.
        reference_N: that of the reference model; None: there is none.
    """
    logprob_S = sample_sums(batch, logprob_N)
    ratio_S = logprob_S if reference_N is None else sample_sums(batch, logprob_N - reference_N)
    tokens_S = host_tensor(batch.targets_S, torch.float64, logprob_N.device)
    return Answers(logprob_S, ratio_S, tokens_S.clamp(min=1))


def sample_sums(batch: Batch, values_N: torch.Tensor) -> torch.Tensor:
    """The sum over the targets of each sample [S], in float64; differentiable."""
    kept_N = torch.where(batch.weight_N > 0, values_N.double(), 0.0)
    return kept_N.new_zeros(len(batch.sample_id_S)).index_add(0, batch.sample_N, kept_N)


def token_mask(batch: Batch, samples: list[int]) -> torch.Tensor:
    """1.0 at the targets of these samples, else 0.0: float32 [N]."""
    chosen = set(samples)
    mask = [float(sample in chosen) for sample in range(len(batch.sample_id_S))]
    mask_S = host_tensor(mask, torch.float32, batch.labels_N.device)
    return torch.where(batch.weight_N > 0, mask_S[batch.sample_N], 0.0)


def channel_table(
    batch: Batch,
    num_channels: int,
    columns: tuple[Column, ...],
    sums: list[tuple[torch.Tensor, Mapping[str, torch.Tensor]]],
) -> torch.Tensor:
    """A channel table [C, K], float32 and detached.

    Args:
        num_channels: C.
        columns: of the objective; each is in one of the sums.
        sums: samples [M] and, by name, the value [M] to add in the channel of each; what is no
            column is left out.
    """
    channel_S = batch.sample_N.new_zeros(len(batch.sample_id_S))
    channel_S = channel_S.scatter(0, batch.sample_N, batch.channel_N)
    table = torch.zeros(num_channels, len(columns), dtype=torch.float64, device=channel_S.device)
    places = {column.name: k for k, column in enumerate(columns)}
    for sample_M, values in sums:
        channel_M = channel_S[sample_M]
        for name, value_M in values.items():
            if name not in places:
                continue
            table[:, places[name]].index_add_(0, channel_M, value_M.detach().double())
    return table.float()


def divided(total: torch.Tensor, denominator: float) -> torch.Tensor:
    """A component of the loss by its denominator; 0 where nothing of the step counts in it."""
    return total / (denominator or 1.0)


def host_tensor(
    values: list[int] | list[float] | tuple[float, ...], dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """Numbers of the host on a device, without waiting for it."""
    tensor = torch.tensor(values, dtype=dtype)
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def _units(batch: Batch) -> Iterator[list[int]]:
    """The answers to each prompt."""
    units: dict[int, list[int]] = {}
    for sample, (unit, role) in enumerate(zip(batch.unit_S, batch.host_S["role_S"], strict=True)):
        if role == ANSWER:
            units.setdefault(unit, []).append(sample)
    yield from units.values()
