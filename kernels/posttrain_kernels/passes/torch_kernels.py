"""Row pass, gather and scatter in torch; strip by strip, so that a CPU keeps them in its cache."""

from __future__ import annotations

import torch

from posttrain_kernels.passes.targets import (
    IGNORE_INDEX,
    Kernels,
    LogitTransform,
    Statistics,
    Targets,
    statistics_dtype,
)
from posttrain_kernels.passes.vocab_shard import SoftmaxPart

# Float32 elements of a strip of rows: on a CPU its passes stay in cache, on a GPU it is large
# enough to hide the launches of its kernels.
STRIP_ELEMENTS_CPU = 1 << 18
STRIP_ELEMENTS_GPU = 1 << 25


def row_pass(logits_BV: torch.Tensor, targets: Targets, stats: Statistics, gradient: bool) -> None:
    """See `passes.targets.RowPass`. With z = transformed logits and p = softmax(z):

    nll = log(sum(exp(z - max))) - (z[label] - max)
    d nll / d z = p - onehot(label),     and p[label] - 1 = expm1(-nll)
    d logsumexp^2 / d z = 2 logsumexp p
    d entropy / d z = -p (log p + entropy)
    """
    elements = STRIP_ELEMENTS_GPU if logits_BV.is_cuda else STRIP_ELEMENTS_CPU
    size = max(1, elements // max(logits_BV.shape[1], 1))
    strips = [slice(start, start + size) for start in range(0, len(logits_BV), size)]
    whole: SoftmaxPart | None = None
    if targets.shard is not None:
        parts = [
            _softmax_part(logits_BV[s], targets.rows(s), stats.entropy is not None) for s in strips
        ]
        columns = (torch.cat(column) for column in zip(*parts, strict=True))
        whole = targets.shard.merge(SoftmaxPart(*columns))
    for s in strips:
        strip = None if whole is None else SoftmaxPart(*(column[s] for column in whole))
        _strip_pass(logits_BV[s], targets.rows(s), stats.rows(s), gradient, strip)


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
    stats: Statistics,
    gradient: bool,
    whole: SoftmaxPart | None,
) -> None:
    label_B1, local_B1 = _local_label(targets, logits_BV.shape[1])
    z_BV, slope_BV = _transform(logits_BV.to(stats.nll.dtype), targets.transform, gradient)
    label_logit_B1 = z_BV.gather(1, label_B1)
    max_B1 = z_BV.amax(dim=1, keepdim=True) if whole is None else whole.max
    z_BV -= max_B1
    shifted_BV = None if stats.entropy is None else z_BV.clone()
    p_BV = z_BV.exp_()  # not yet divided by its sum
    if whole is None:
        whole = SoftmaxPart(
            max_B1, p_BV.sum(dim=1, keepdim=True), label_logit_B1, _dot(p_BV, shifted_BV)
        )
    log_sum_B1 = whole.sum_exp.log()
    ignored_B1 = targets.labels_N[:, None] == IGNORE_INDEX
    invalid_B1 = ~(_in_vocabulary(targets, logits_BV.shape[1]) | ignored_B1)
    nll_B1 = (log_sum_B1 - (whole.label_logit - whole.max)).masked_fill_(ignored_B1, 0)
    nll_B1.masked_fill_(invalid_B1, torch.nan)  # on a GPU, where labels are not checked before
    logsumexp_B1 = whole.max + log_sum_B1
    entropy_B1 = log_sum_B1 - whole.dot / whole.sum_exp
    for column, value_B1 in (
        (stats.nll, nll_B1),
        (stats.logsumexp, logsumexp_B1),
        (stats.correct, (whole.label_logit == whole.max) & ~ignored_B1 & ~invalid_B1),
        (stats.entropy, entropy_B1.masked_fill(ignored_B1, 0)),
    ):
        if column is not None:
            column.copy_(value_B1[:, 0])
    if not gradient:
        return

    # --- logits become their gradient; of each row: slope * (share * p - weight * onehot + ...)
    weight_B1 = targets.weight_N[:, None].masked_fill(invalid_B1, torch.nan)
    z_loss_B1 = 2 * targets.transform.z_loss * logsumexp_B1
    label_grad_B1 = weight_B1 * (torch.expm1(-nll_B1) + z_loss_B1 * torch.exp(-nll_B1))
    if targets.entropy_weight_N is not None and shifted_BV is not None:
        entropy_weight_B1 = targets.entropy_weight_N[:, None] / whole.sum_exp
        shifted_BV += entropy_B1 - log_sum_B1  # log p + entropy
        shifted_BV.masked_fill_(p_BV == 0, 0)
        label_entropy_B1 = (p_BV * shifted_BV).gather(1, label_B1) * entropy_weight_B1
        label_grad_B1 = label_grad_B1 - label_entropy_B1
        shifted_BV *= p_BV * entropy_weight_B1
    else:
        shifted_BV = None
    p_BV *= weight_B1 * (1 + z_loss_B1) / whole.sum_exp
    if shifted_BV is not None:
        p_BV -= shifted_BV
    if local_B1 is not None:  # the label of another rank changes nothing here
        label_grad_B1 = torch.where(local_B1, label_grad_B1, p_BV.gather(1, label_B1))
    p_BV.scatter_(1, label_B1, label_grad_B1)
    if targets.transform.logit_scale != 1:
        p_BV *= targets.transform.logit_scale
    if slope_BV is not None:
        p_BV *= slope_BV
    if p_BV is not logits_BV:
        logits_BV.copy_(p_BV)


def _transform(
    z_BV: torch.Tensor, transform: LogitTransform, gradient: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Raw logits -> z, in place, and the slope of the softcap where it has one."""
    if transform.softcap is None:
        return (z_BV.mul_(transform.logit_scale) if transform.logit_scale != 1 else z_BV), None
    z_BV.mul_(transform.logit_scale / transform.softcap).tanh_()
    slope_BV = 1 - z_BV.square() if gradient else None
    return z_BV.mul_(transform.softcap), slope_BV


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


def _softmax_part(logits_BV: torch.Tensor, targets: Targets, entropy: bool) -> SoftmaxPart:
    """The statistics of this rank's part of the vocabulary; leaves the logits as they are."""
    label_B1, local_B1 = _local_label(targets, logits_BV.shape[1])
    acc_dtype = statistics_dtype(logits_BV.dtype)
    z_BV, _ = _transform(logits_BV.to(acc_dtype, copy=True), targets.transform, gradient=False)
    label_logit_B1 = z_BV.gather(1, label_B1)
    if local_B1 is not None:
        label_logit_B1 = label_logit_B1.masked_fill(~local_B1, float("-inf"))
    # Finite also where this rank's part is all -inf.
    max_B1 = z_BV.amax(dim=1, keepdim=True).clamp(min=torch.finfo(acc_dtype).min)
    z_BV -= max_B1
    shifted_BV = z_BV.clone() if entropy else None
    exp_BV = z_BV.exp_()
    return SoftmaxPart(
        max_B1, exp_BV.sum(dim=1, keepdim=True), label_logit_B1, _dot(exp_BV, shifted_BV)
    )


def _dot(exp_BV: torch.Tensor, shifted_BV: torch.Tensor | None) -> torch.Tensor:
    if shifted_BV is None:
        return exp_BV.new_zeros(len(exp_BV), 1)
    # A logit of -inf has probability 0 and adds nothing.
    products_BV = (exp_BV * shifted_BV).masked_fill_(exp_BV == 0, 0)
    return products_BV.sum(dim=1, keepdim=True)
