"""The row pass, gather and scatter as Triton kernels; importing this file needs triton.

No kernel uses atomics: the same input gives the same bits. With TRITON_INTERPRET=1 in the
environment before the import they run on the CPU.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
import triton.language as tl

from posttrain_kernels.passes.targets import IGNORE_INDEX, Kernels, Statistics, Targets
from posttrain_kernels.passes.vocab_shard import SoftmaxPart

# Columns that a program takes at a time, and their warps: wide enough to keep the memory busy.
BLOCK_COLUMNS, ROW_WARPS = 4096, 8
COPY_COLUMNS = 1024

IGNORE: tl.constexpr = tl.constexpr(IGNORE_INDEX)


def row_pass(logits_BV: torch.Tensor, targets: Targets, stats: Statistics, gradient: bool) -> None:
    """See `posttrain_kernels.passes.targets.RowPass`; one program per row, as in torch_kernels.py.

    A label outside of the vocabulary makes the loss and the gradient of its row NaN, and stops
    the kernel under TRITON_DEBUG=1.
    """
    with _device_of(logits_BV):
        if targets.shard is None:
            _launch(logits_BV, targets, stats, None, read=True, gradient=gradient)
            return
        part = SoftmaxPart(*stats.nll.new_empty(4, len(logits_BV), 1))
        _launch(logits_BV, targets, None, part, read=True, gradient=False)
        merged = SoftmaxPart(*(column.contiguous() for column in targets.shard.merge(part)))
        _launch(logits_BV, targets, stats, merged, read=False, gradient=gradient)


def _device_of(tensor: torch.Tensor) -> AbstractContextManager[Any]:
    """Make the tensor's GPU the current one, where Triton launches."""
    context: AbstractContextManager[Any] = nullcontext()
    if tensor.is_cuda:
        context = torch.cuda.device(tensor.device)
    return context


def _launch(
    logits_BV: torch.Tensor,
    targets: Targets,
    stats: Statistics | None,
    softmax: SoftmaxPart | None,
    *,
    read: bool,
    gradient: bool,
) -> None:
    """`read`: find the softmax's statistics (kept in `softmax` where given), else take them."""
    num_rows, num_columns = logits_BV.shape
    if num_rows == 0:
        return
    transform, shard = targets.transform, targets.shard
    none = logits_BV  # stands for a pointer that is not used
    # Without `stats` the caller only wants the parts; entropy's is made at no cost worth a switch.
    wants_entropy = stats is not None and stats.entropy is not None
    _row_kernel[(num_rows,)](
        logits_BV,
        logits_BV.stride(0),
        targets.labels_N,
        targets.weight_N,
        none if targets.entropy_weight_N is None else targets.entropy_weight_N,
        none if stats is None else stats.nll,
        none if stats is None else stats.logsumexp,
        none if stats is None else stats.correct,
        stats.entropy if stats is not None and stats.entropy is not None else none,
        *((none,) * 4 if softmax is None else softmax),
        num_columns,
        # Up to a multiple of 16, where the row is padded: so loads and stores are wide.
        min(logits_BV.stride(0), triton.cdiv(num_columns, 16) * 16),
        0 if shard is None else shard.start,
        num_columns if shard is None else shard.size,
        transform.logit_scale,
        transform.softcap or 1.0,
        transform.z_loss,
        CAPPED=transform.softcap is not None,
        READ=read,
        PARTS=softmax is not None,
        FILL=stats is not None,
        ENTROPY=wants_entropy,
        GRADIENT=gradient,
        ENTROPY_GRADIENT=targets.entropy_weight_N is not None,
        ACC_DTYPE=tl.float64 if targets.weight_N.dtype == torch.float64 else tl.float32,
        BLOCK=min(BLOCK_COLUMNS, triton.next_power_of_2(num_columns)),
        num_warps=ROW_WARPS,
    )


@triton.jit  # type: ignore[untyped-decorator]
def _transform(raw, logit_scale, softcap, CAPPED: tl.constexpr):  # type: ignore[no-untyped-def]
    """z and dz / d raw."""
    z = raw * logit_scale
    slope = logit_scale
    if CAPPED:
        # tanh from exp(-2|y|), which cannot overflow; near 0, where that cancels, by its series.
        y = z / softcap
        small = tl.exp(-2.0 * tl.abs(y))
        size = (1.0 - small) / (1.0 + small)
        y2 = y * y
        series = y * (1.0 + y2 * (-1.0 / 3 + y2 * (2.0 / 15 + y2 * (-17.0 / 315))))
        tanh = tl.where(y2 < 0.01, series, tl.where(y < 0, -size, size))
        z = softcap * tanh
        slope = logit_scale * (1.0 - tanh * tanh)
    return z, slope


@triton.jit  # type: ignore[untyped-decorator]
def _row_kernel(  # type: ignore[no-untyped-def]
    logits_ptr, row_stride, label_ptr, weight_ptr, entropy_weight_ptr,
    nll_ptr, logsumexp_ptr, correct_ptr, entropy_ptr,
    max_ptr, sum_ptr, label_logit_ptr, dot_ptr,
    num_columns, readable_columns, first_column, vocabulary,
    logit_scale, softcap, z_loss,
    CAPPED: tl.constexpr, READ: tl.constexpr, PARTS: tl.constexpr, FILL: tl.constexpr,
    ENTROPY: tl.constexpr, GRADIENT: tl.constexpr, ENTROPY_GRADIENT: tl.constexpr,
    ACC_DTYPE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * row_stride
    label = tl.load(label_ptr + row)
    ignored = label == IGNORE
    valid = ignored | ((label >= 0) & (label < vocabulary))
    tl.device_assert(valid, "a label is outside of the vocabulary")
    local = label - first_column

    if READ:
        max_z, sum_exp, dot, label_z = _read_row(
            row_ptr, local, num_columns, readable_columns, logit_scale, softcap,
            CAPPED, ACC_DTYPE, BLOCK,
        )  # fmt: skip
        if PARTS:
            tl.store(max_ptr + row, max_z)
            tl.store(sum_ptr + row, sum_exp)
            tl.store(label_logit_ptr + row, label_z)
            tl.store(dot_ptr + row, dot)
    else:
        max_z = tl.load(max_ptr + row)
        sum_exp = tl.load(sum_ptr + row)
        label_z = tl.load(label_logit_ptr + row)
        dot = tl.load(dot_ptr + row)

    if FILL:
        log_sum = tl.log(sum_exp)
        logsumexp = max_z + log_sum
        entropy = log_sum - dot / sum_exp
        nll = tl.where(ignored, 0.0, log_sum - (label_z - max_z))
        nll = tl.where(valid, nll, float("nan"))
        tl.store(nll_ptr + row, nll)
        tl.store(logsumexp_ptr + row, logsumexp)
        tl.store(correct_ptr + row, (label_z == max_z) & valid & (label != IGNORE))
        if ENTROPY:
            tl.store(entropy_ptr + row, tl.where(ignored, 0.0, entropy))
        if GRADIENT:
            weight = tl.load(weight_ptr + row)
            weight = tl.where(valid, weight, float("nan"))
            p_factor = weight * (1.0 + 2.0 * z_loss * logsumexp)
            entropy_weight = tl.zeros((), ACC_DTYPE)
            if ENTROPY_GRADIENT:
                entropy_weight = tl.load(entropy_weight_ptr + row)
            _write_gradient(
                row_ptr, local, num_columns, readable_columns, logit_scale, softcap, max_z, sum_exp,
                p_factor, weight, entropy_weight, entropy - log_sum,
                CAPPED, ENTROPY_GRADIENT, ACC_DTYPE, BLOCK,
            )  # fmt: skip


@triton.jit  # type: ignore[untyped-decorator]
def _read_row(  # type: ignore[no-untyped-def]
    row_ptr,
    local,
    num_columns,
    readable_columns,
    logit_scale,
    softcap,
    CAPPED: tl.constexpr,
    ACC_DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Largest z, sum of exp(z - largest), sum of exp(z - largest) * (z - largest), z[label]."""
    columns = tl.arange(0, BLOCK)
    max_z = tl.full((), float("-inf"), ACC_DTYPE)
    sum_exp = tl.zeros((), ACC_DTYPE)
    dot = tl.zeros((), ACC_DTYPE)
    for start in range(0, num_columns, BLOCK):
        inside = start + columns < num_columns
        readable = start + columns < readable_columns
        raw = tl.load(row_ptr + start + columns, mask=readable, other=0.0).to(ACC_DTYPE)
        z, _slope = _transform(raw, logit_scale, softcap, CAPPED)
        z = tl.where(inside, z, float("-inf"))
        new_max = tl.maximum(max_z, tl.max(z, axis=0))
        base = tl.where(new_max == float("-inf"), 0.0, new_max)  # a row of -inf so far
        shift = tl.where(sum_exp > 0, max_z - base, 0.0)
        factor = tl.exp(shift)
        shifted = z - base
        exps = tl.exp(shifted)
        dot = factor * (dot + shift * sum_exp)
        dot += tl.sum(exps * tl.where(exps > 0, shifted, 0.0), axis=0)
        sum_exp = factor * sum_exp + tl.sum(exps, axis=0)
        max_z = new_max
    here = (local >= 0) & (local < num_columns)
    label_raw = tl.load(row_ptr + tl.where(here, local, 0)).to(ACC_DTYPE)
    label_z, _label_slope = _transform(label_raw, logit_scale, softcap, CAPPED)
    label_z = tl.where(here, label_z, float("-inf"))
    return max_z, sum_exp, dot, label_z


@triton.jit  # type: ignore[untyped-decorator]
def _write_gradient(  # type: ignore[no-untyped-def]
    row_ptr,
    local,
    num_columns,
    readable_columns,
    logit_scale,
    softcap,
    max_z,
    sum_exp,
    p_factor,  # what p is multiplied by
    label_weight,  # what is taken off at the label
    entropy_weight,  # the weight of the entropy
    entropy_minus_log_sum,
    CAPPED: tl.constexpr,
    ENTROPY_GRADIENT: tl.constexpr,
    ACC_DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Logits become their gradient."""
    columns = tl.arange(0, BLOCK)
    for start in range(0, num_columns, BLOCK):
        readable = start + columns < readable_columns
        raw = tl.load(row_ptr + start + columns, mask=readable, other=0.0).to(ACC_DTYPE)
        z, slope = _transform(raw, logit_scale, softcap, CAPPED)
        # Less the largest first: z - logsumexp would round where both are large.
        shifted = z - max_z
        p = tl.exp(shifted) / sum_exp
        grad = p_factor * p - tl.where(start + columns == local, label_weight, 0.0)
        if ENTROPY_GRADIENT:
            grad -= entropy_weight * p * tl.where(p > 0, shifted + entropy_minus_log_sum, 0.0)
        grad = (grad * slope).to(row_ptr.dtype.element_ty)
        tl.store(row_ptr + start + columns, grad, mask=readable)


def gather(values_TD: torch.Tensor, rows_N: torch.Tensor) -> torch.Tensor:
    """Some rows, [N, D]; NaN where there is no such row."""
    num_rows, width = len(rows_N), values_TD.shape[1]
    gathered_ND = values_TD.new_empty(num_rows, width)
    if num_rows and width:
        with _device_of(values_TD):
            _gather_kernel[(num_rows, triton.cdiv(width, COPY_COLUMNS))](
                values_TD,
                *values_TD.stride(),
                len(values_TD),
                rows_N.contiguous(),
                gathered_ND,
                width,
                BLOCK=COPY_COLUMNS,
            )
    return gathered_ND


@triton.jit  # type: ignore[untyped-decorator]
def _gather_kernel(  # type: ignore[no-untyped-def]
    values_ptr,
    row_stride,
    column_stride,
    height,
    rows_ptr,
    gathered_ptr,
    width,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    source = tl.load(rows_ptr + row)
    inside = (source >= 0) & (source < height)
    place = source * row_stride + columns.to(tl.int64) * column_stride
    values = tl.load(values_ptr + place, mask=inside & (columns < width), other=float("nan"))
    tl.store(gathered_ptr + row * width + columns, values, mask=columns < width)


def scatter(
    values_ND: torch.Tensor, rows_N: torch.Tensor, num_rows: int, factor: torch.Tensor
) -> torch.Tensor:
    """`factor` times the sum of the values of each row, [T, D].

    Each output row looks for its values, in their order, so that there is nothing to race for,
    and no pass that writes zeros first.
    """
    width = values_ND.shape[1]
    sums_TD = values_ND.new_empty(num_rows, width)
    if num_rows and width:
        sorted_N, order_N = torch.sort(rows_N, stable=True)
        edges = torch.arange(num_rows + 1, device=rows_N.device)
        first_T1 = torch.searchsorted(sorted_N, edges)
        with _device_of(values_ND):
            _scatter_kernel[(num_rows, triton.cdiv(width, COPY_COLUMNS))](
                values_ND, order_N, first_T1, factor, sums_TD, width, BLOCK=COPY_COLUMNS
            )
    return sums_TD


@triton.jit  # type: ignore[untyped-decorator]
def _scatter_kernel(  # type: ignore[no-untyped-def]
    values_ptr, order_ptr, first_ptr, factor_ptr, sums_ptr, width, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    factor = tl.load(factor_ptr)
    sums = tl.zeros((BLOCK,), factor.dtype)
    for place in range(tl.load(first_ptr + row), tl.load(first_ptr + row + 1)):
        source = tl.load(order_ptr + place)
        values = tl.load(values_ptr + source * width + columns, mask=columns < width, other=0.0)
        sums += values.to(factor.dtype)
    sums = (sums * factor).to(sums_ptr.dtype.element_ty)
    tl.store(sums_ptr + row * width + columns, sums, mask=columns < width)


KERNELS = Kernels(row_pass, gather, scatter)
