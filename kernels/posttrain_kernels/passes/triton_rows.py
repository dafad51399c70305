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

from posttrain_kernels.passes.rows import Softmax
from posttrain_kernels.passes.targets import IGNORED, Kernels, Statistics, Targets

# Columns that a program takes at a time, and their warps: wide enough to keep the memory busy.
BLOCK_COLUMNS, ROW_WARPS = 4096, 8
COPY_COLUMNS = 1024

NEVER: tl.constexpr = tl.constexpr(IGNORED)


def row_pass(logits_BV: torch.Tensor, targets: Targets, found: Statistics, gradient: bool) -> None:
    """See `posttrain_kernels.passes.targets.RowPass`; one program a row, the formulas of rows.py.

    A label outside of the vocabulary makes the loss and the gradient of its row NaN, and stops
    the kernel under TRITON_DEBUG=1.
    """
    with _device_of(logits_BV):
        if targets.shard is None:
            _launch(logits_BV, targets, found, None, read=True, gradient=gradient)
            return
        part = Softmax(*found.nll.new_empty(4, len(logits_BV), 1))
        _launch(logits_BV, targets, None, part, read=True, gradient=False)
        merged = Softmax(*(column.contiguous() for column in targets.shard.merge(part)))
        _launch(logits_BV, targets, found, merged, read=False, gradient=gradient)


def _device_of(tensor: torch.Tensor) -> AbstractContextManager[Any]:
    """Make the tensor's GPU the current one, where Triton launches."""
    context: AbstractContextManager[Any] = nullcontext()
    if tensor.is_cuda:
        context = torch.cuda.device(tensor.device)
    return context


def _launch(
    logits_BV: torch.Tensor,
    targets: Targets,
    found: Statistics | None,
    softmax: Softmax | None,
    *,
    read: bool,
    gradient: bool,
) -> None:
    """`read`: find the softmax's statistics (kept in `softmax` where given), else take them."""
    num_rows, num_columns = logits_BV.shape
    if num_rows == 0:
        return
    shape, shard = targets.shape, targets.shard
    none = logits_BV  # stands for a pointer that is not used
    # Without `found` the caller only wants the parts; entropy's is made at no cost worth a switch.
    wants_entropy = found is not None and found.entropy is not None
    _row_kernel[(num_rows,)](
        logits_BV,
        logits_BV.stride(0),
        targets.labels_N,
        targets.weight_N,
        none if targets.entropy_weight_N is None else targets.entropy_weight_N,
        none if found is None else found.nll,
        none if found is None else found.logsumexp,
        none if found is None else found.correct,
        found.entropy if found is not None and found.entropy is not None else none,
        *((none,) * 4 if softmax is None else softmax),
        num_columns,
        # Up to a multiple of 16, where the row has room behind it: so loads and stores are wide.
        min(logits_BV.stride(0), triton.cdiv(num_columns, 16) * 16),
        0 if shard is None else shard.start,
        num_columns if shard is None else shard.size,
        shape.logit_scale,
        shape.softcap or 1.0,
        shape.z_loss,
        CAPPED=shape.softcap is not None,
        READ=read,
        PARTS=softmax is not None,
        FILL=found is not None,
        ENTROPY=wants_entropy,
        GRADIENT=gradient,
        ENTROPY_GRADIENT=targets.entropy_weight_N is not None,
        WIDE=tl.float64 if targets.weight_N.dtype == torch.float64 else tl.float32,
        BLOCK=min(BLOCK_COLUMNS, triton.next_power_of_2(num_columns)),
        num_warps=ROW_WARPS,
    )


@triton.jit  # type: ignore[untyped-decorator]
def _shaped(raw, logit_scale, softcap, CAPPED: tl.constexpr):  # type: ignore[no-untyped-def]
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
    max_ptr, sum_ptr, own_ptr, dot_ptr,
    num_columns, readable_columns, first_column, vocabulary,
    logit_scale, softcap, z_loss,
    CAPPED: tl.constexpr, READ: tl.constexpr, PARTS: tl.constexpr, FILL: tl.constexpr,
    ENTROPY: tl.constexpr, GRADIENT: tl.constexpr, ENTROPY_GRADIENT: tl.constexpr,
    WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * row_stride
    label = tl.load(label_ptr + row)
    ignored = label == NEVER
    valid = ignored | ((label >= 0) & (label < vocabulary))
    tl.device_assert(valid, "a label is outside of the vocabulary")
    local = label - first_column

    if READ:
        top, total, dot, own = _read_row(
            row_ptr, local, num_columns, readable_columns, logit_scale, softcap, CAPPED, WIDE, BLOCK
        )
        if PARTS:
            tl.store(max_ptr + row, top)
            tl.store(sum_ptr + row, total)
            tl.store(own_ptr + row, own)
            tl.store(dot_ptr + row, dot)
    else:
        top = tl.load(max_ptr + row)
        total = tl.load(sum_ptr + row)
        own = tl.load(own_ptr + row)
        dot = tl.load(dot_ptr + row)

    if FILL:
        log_total = tl.log(total)
        logsumexp = top + log_total
        entropy = log_total - dot / total
        nll = tl.where(ignored, 0.0, log_total - (own - top))
        nll = tl.where(valid, nll, float("nan"))
        tl.store(nll_ptr + row, nll)
        tl.store(logsumexp_ptr + row, logsumexp)
        tl.store(correct_ptr + row, (own == top) & valid & (label != NEVER))
        if ENTROPY:
            tl.store(entropy_ptr + row, tl.where(ignored, 0.0, entropy))
        if GRADIENT:
            weight = tl.load(weight_ptr + row)
            weight = tl.where(valid, weight, float("nan"))
            on_p = weight * (1.0 + 2.0 * z_loss * logsumexp)
            pull = tl.zeros((), WIDE)
            if ENTROPY_GRADIENT:
                pull = tl.load(entropy_weight_ptr + row)
            _write_gradient(
                row_ptr, local, num_columns, readable_columns, logit_scale, softcap, top, total,
                on_p, weight, pull, entropy - log_total,
                CAPPED, ENTROPY_GRADIENT, WIDE, BLOCK,
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
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Largest z, sum of exp(z - largest), sum of exp(z - largest) * (z - largest), z[label]."""
    columns = tl.arange(0, BLOCK)
    top = tl.full((), float("-inf"), WIDE)
    total = tl.zeros((), WIDE)
    dot = tl.zeros((), WIDE)
    for start in range(0, num_columns, BLOCK):
        inside = start + columns < num_columns
        readable = start + columns < readable_columns
        raw = tl.load(row_ptr + start + columns, mask=readable, other=0.0).to(WIDE)
        z, _slope = _shaped(raw, logit_scale, softcap, CAPPED)
        z = tl.where(inside, z, float("-inf"))
        higher = tl.maximum(top, tl.max(z, axis=0))
        base = tl.where(higher == float("-inf"), 0.0, higher)  # a row of -inf so far
        lower = tl.where(total > 0, top - base, 0.0)
        share = tl.exp(lower)
        shifted = z - base
        exps = tl.exp(shifted)
        dot = share * (dot + lower * total)
        dot += tl.sum(exps * tl.where(exps > 0, shifted, 0.0), axis=0)
        total = share * total + tl.sum(exps, axis=0)
        top = higher
    here = (local >= 0) & (local < num_columns)
    own_raw = tl.load(row_ptr + tl.where(here, local, 0)).to(WIDE)
    own, _own_slope = _shaped(own_raw, logit_scale, softcap, CAPPED)
    own = tl.where(here, own, float("-inf"))
    return top, total, dot, own


@triton.jit  # type: ignore[untyped-decorator]
def _write_gradient(  # type: ignore[no-untyped-def]
    row_ptr,
    local,
    num_columns,
    readable_columns,
    logit_scale,
    softcap,
    top,
    total,
    on_p,  # what p is multiplied by
    on_label,  # what is taken off at the label
    pull,  # the weight of the entropy
    entropy_less_log_total,
    CAPPED: tl.constexpr,
    ENTROPY_GRADIENT: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Logits become their gradient."""
    columns = tl.arange(0, BLOCK)
    for start in range(0, num_columns, BLOCK):
        readable = start + columns < readable_columns
        raw = tl.load(row_ptr + start + columns, mask=readable, other=0.0).to(WIDE)
        z, slope = _shaped(raw, logit_scale, softcap, CAPPED)
        # Less the largest first: z - logsumexp would round where both are large.
        shifted = z - top
        p = tl.exp(shifted) / total
        grad = on_p * p - tl.where(start + columns == local, on_label, 0.0)
        if ENTROPY_GRADIENT:
            grad -= pull * p * tl.where(p > 0, shifted + entropy_less_log_total, 0.0)
        grad = (grad * slope).to(row_ptr.dtype.element_ty)
        tl.store(row_ptr + start + columns, grad, mask=readable)


def gather(values_TD: torch.Tensor, rows_N: torch.Tensor) -> torch.Tensor:
    """Some rows, [N, D]; NaN where there is no such row."""
    num_rows, width = len(rows_N), values_TD.shape[1]
    taken_ND = values_TD.new_empty(num_rows, width)
    if num_rows and width:
        with _device_of(values_TD):
            _gather_kernel[(num_rows, triton.cdiv(width, COPY_COLUMNS))](
                values_TD,
                *values_TD.stride(),
                len(values_TD),
                rows_N.contiguous(),
                taken_ND,
                width,
                BLOCK=COPY_COLUMNS,
            )
    return taken_ND


@triton.jit  # type: ignore[untyped-decorator]
def _gather_kernel(  # type: ignore[no-untyped-def]
    values_ptr, row_stride, column_stride, height, rows_ptr, taken_ptr, width, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    source = tl.load(rows_ptr + row)
    inside = (source >= 0) & (source < height)
    place = source * row_stride + columns.to(tl.int64) * column_stride
    values = tl.load(values_ptr + place, mask=inside & (columns < width), other=float("nan"))
    tl.store(taken_ptr + row * width + columns, values, mask=columns < width)


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
