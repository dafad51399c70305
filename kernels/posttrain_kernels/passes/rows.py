"""The row pass in torch: strip by strip, so that on a CPU its many steps stay in cache."""

from __future__ import annotations

from typing import NamedTuple

import torch

from posttrain_kernels.passes.targets import (
    IGNORED,
    Kernels,
    LogitShape,
    Statistics,
    Targets,
    statistics_dtype,
)

# Float32 elements of a strip of rows: on a CPU its passes stay in cache, on a GPU it is large
# enough to hide the launches of its kernels.
STRIP_ELEMENTS_CPU = 1 << 18
STRIP_ELEMENTS_GPU = 1 << 25


class Softmax(NamedTuple):
    """What a softmax needs to know of the whole row, each [B, 1]."""

    max: torch.Tensor
    sum: torch.Tensor  # of exp(z - max)
    own: torch.Tensor  # z[label]; -inf where the label is not in this part of the vocabulary
    dot: torch.Tensor  # of exp(z - max) and z - max; 0 where no entropy is asked for


def row_pass(logits_BV: torch.Tensor, targets: Targets, found: Statistics, gradient: bool) -> None:
    """See `posttrain_kernels.passes.targets.RowPass`. With z = shaped logits and p = softmax(z):

    nll = log(sum(exp(z - max))) - (z[label] - max)
    d nll / d z = p - onehot(label),     and p[label] - 1 = expm1(-nll)
    d logsumexp^2 / d z = 2 logsumexp p
    d entropy / d z = -p (log p + entropy)
    """
    elements = STRIP_ELEMENTS_GPU if logits_BV.is_cuda else STRIP_ELEMENTS_CPU
    size = max(1, elements // max(logits_BV.shape[1], 1))
    strips = [slice(start, start + size) for start in range(0, len(logits_BV), size)]
    whole: Softmax | None = None
    if targets.shard is not None:
        parts = [_part(logits_BV[s], targets.rows(s), found.entropy is not None) for s in strips]
        columns = (torch.cat(column) for column in zip(*parts, strict=True))
        whole = targets.shard.merge(Softmax(*columns))
    for s in strips:
        strip = None if whole is None else Softmax(*(column[s] for column in whole))
        _strip_pass(logits_BV[s], targets.rows(s), found.rows(s), gradient, strip)


def gather(values_TD: torch.Tensor, rows_N: torch.Tensor) -> torch.Tensor:
    """Some rows, [N, D]."""
    return values_TD.index_select(0, rows_N)


def scatter(
    values_ND: torch.Tensor, rows_N: torch.Tensor, num_rows: int, factor: torch.Tensor
) -> torch.Tensor:
    """`factor` times the sum of the values of each row, [T, D].

    On a GPU torch adds in no fixed order unless torch.use_deterministic_algorithms is on; rows
    that stand once among `rows_N`, or again with zeros, are exact either way.
    """
    zeros_TD = values_ND.new_zeros(num_rows, values_ND.shape[1])
    return zeros_TD.index_add_(0, rows_N, values_ND.mul_(factor))


KERNELS = Kernels(row_pass, gather, scatter)


def _strip_pass(
    logits_BV: torch.Tensor,
    targets: Targets,
    found: Statistics,
    gradient: bool,
    whole: Softmax | None,
) -> None:
    label_B1, local_B1 = _local_label(targets, logits_BV.shape[1])
    z_BV, slope_BV = _shaped(logits_BV.to(found.nll.dtype), targets.shape, gradient)
    own_B1 = z_BV.gather(1, label_B1)
    max_B1 = z_BV.amax(dim=1, keepdim=True) if whole is None else whole.max
    z_BV -= max_B1
    shifted_BV = None if found.entropy is None else z_BV.clone()
    p_BV = z_BV.exp_()  # not yet divided by its sum
    if whole is None:
        whole = Softmax(max_B1, p_BV.sum(dim=1, keepdim=True), own_B1, _dot(p_BV, shifted_BV))
    log_sum_B1 = whole.sum.log()
    ignored_B1 = targets.labels_N[:, None] == IGNORED
    invalid_B1 = ~(_in_vocabulary(targets, logits_BV.shape[1]) | ignored_B1)
    nll_B1 = (log_sum_B1 - (whole.own - whole.max)).masked_fill_(ignored_B1, 0)
    nll_B1.masked_fill_(invalid_B1, torch.nan)  # seen here on a GPU only, where nobody looked
    logsumexp_B1 = whole.max + log_sum_B1
    entropy_B1 = log_sum_B1 - whole.dot / whole.sum
    for column, value_B1 in (
        (found.nll, nll_B1),
        (found.logsumexp, logsumexp_B1),
        (found.correct, (whole.own == whole.max) & ~ignored_B1 & ~invalid_B1),
        (found.entropy, entropy_B1.masked_fill(ignored_B1, 0)),
    ):
        if column is not None:
            column.copy_(value_B1[:, 0])
    if not gradient:
        return

    # --- logits become their gradient; of each row: slope * (share * p - weight * onehot + ...)
    weight_B1 = targets.weight_N[:, None].masked_fill(invalid_B1, torch.nan)
    penalty_B1 = 2 * targets.shape.z_loss * logsumexp_B1
    label_grad_B1 = weight_B1 * (torch.expm1(-nll_B1) + penalty_B1 * torch.exp(-nll_B1))
    if targets.entropy_weight_N is not None and shifted_BV is not None:
        pull_B1 = targets.entropy_weight_N[:, None] / whole.sum
        shifted_BV += entropy_B1 - log_sum_B1  # log p + entropy
        shifted_BV.masked_fill_(p_BV == 0, 0)
        label_pull_B1 = (p_BV * shifted_BV).gather(1, label_B1) * pull_B1
        label_grad_B1 = label_grad_B1 - label_pull_B1
        shifted_BV *= p_BV * pull_B1
    else:
        shifted_BV = None
    p_BV *= weight_B1 * (1 + penalty_B1) / whole.sum
    if shifted_BV is not None:
        p_BV -= shifted_BV
    if local_B1 is not None:  # a label of another rank leaves its stand-in here as it is
        label_grad_B1 = torch.where(local_B1, label_grad_B1, p_BV.gather(1, label_B1))
    p_BV.scatter_(1, label_B1, label_grad_B1)
    if targets.shape.logit_scale != 1:
        p_BV *= targets.shape.logit_scale
    if slope_BV is not None:
        p_BV *= slope_BV
    if p_BV is not logits_BV:
        logits_BV.copy_(p_BV)


def _shaped(
    z_BV: torch.Tensor, shape: LogitShape, gradient: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Raw logits -> z, in place, and the slope of the softcap where it has one."""
    if shape.softcap is None:
        return (z_BV.mul_(shape.logit_scale) if shape.logit_scale != 1 else z_BV), None
    z_BV.mul_(shape.logit_scale / shape.softcap).tanh_()
    slope_BV = 1 - z_BV.square() if gradient else None
    return z_BV.mul_(shape.softcap), slope_BV


def _local_label(targets: Targets, num_columns: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """A column of this part of the vocabulary for each row, and whether it is the label's."""
    label_B1 = targets.labels_N[:, None]
    if targets.shard is None:
        return label_B1.clamp(0, num_columns - 1), None
    label_B1 = label_B1 - targets.shard.start
    local_B1 = (label_B1 >= 0) & (label_B1 < num_columns)
    return torch.where(local_B1, label_B1, 0), local_B1


def _in_vocabulary(targets: Targets, num_columns: int) -> torch.Tensor:
    label_B1 = targets.labels_N[:, None]
    end = num_columns if targets.shard is None else targets.shard.size
    return (label_B1 >= 0) & (label_B1 < end)


def _part(logits_BV: torch.Tensor, targets: Targets, entropy: bool) -> Softmax:
    """The statistics of this rank's part of the vocabulary; leaves the logits as they are."""
    label_B1, local_B1 = _local_label(targets, logits_BV.shape[1])
    wide = statistics_dtype(logits_BV.dtype)
    z_BV, _ = _shaped(logits_BV.to(wide, copy=True), targets.shape, gradient=False)
    own_B1 = z_BV.gather(1, label_B1)
    if local_B1 is not None:
        own_B1 = own_B1.masked_fill(~local_B1, float("-inf"))
    # Finite also where this rank's part is all -inf.
    max_B1 = z_BV.amax(dim=1, keepdim=True).clamp(min=torch.finfo(wide).min)
    z_BV -= max_B1
    shifted_BV = z_BV.clone() if entropy else None
    exp_BV = z_BV.exp_()
    return Softmax(max_B1, exp_BV.sum(dim=1, keepdim=True), own_B1, _dot(exp_BV, shifted_BV))


def _dot(exp_BV: torch.Tensor, shifted_BV: torch.Tensor | None) -> torch.Tensor:
    if shifted_BV is None:
        return exp_BV.new_zeros(len(exp_BV), 1)
    # A logit of -inf has probability 0 and adds nothing.
    products_BV = (exp_BV * shifted_BV).masked_fill_(exp_BV == 0, 0)
    return products_BV.sum(dim=1, keepdim=True)
