"""The three matrix products of the head, in the way that is fast on the device.

    logits_BV       = hidden_BD @ weight_VD.T + bias_V
    grad_hidden_BD  = dlogits_BV @ weight_VD
    grad_weight_VD += dlogits_BV.T @ hidden_BD

`NativeMatmuls` hands them to the BLAS in the dtype of the input. `UpcastMatmuls` serves CPUs whose
BLAS multiplies 16-bit numbers ten to three hundred times slower than float32: the weight is cast to
float32 block by block, so that no float32 copy of it exists.
"""

from __future__ import annotations

import time
from functools import cache
from pathlib import Path

import torch

from posttrain_kernels.passes.targets import statistics_dtype

# Elements of an upcast block of the weight: small enough for a cache, large for a product.
BLOCK_ELEMENTS = 1 << 21


# What /proc/cpuinfo calls the instructions for products of a dtype: of AMX, AVX-512 and Arm.
_FLAGS = {
    torch.bfloat16: {"amx_bf16", "avx512_bf16", "bf16"},
    torch.float16: {"amx_fp16", "avx512_fp16"},
}

_TIMED_PRODUCTS = 1 << 28  # multiplications of one timed product: some milliseconds


@cache
def multiplies_fast(dtype: torch.dtype) -> bool:
    """Whether this machine's CPU has instructions for products of `dtype`."""
    if dtype not in _FLAGS:
        return True
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return False
    flags = next((line for line in lines if line.lower().startswith(("flags", "features"))), "")
    return not _FLAGS[dtype].isdisjoint(flags.partition(":")[2].split())


def product_speedup(
    dtype: torch.dtype, width_in: int, width_out: int, rows: int = 1024, budget_s: float = 0.05
) -> float:
    """How many times as fast as in float32 this CPU multiplies in `dtype`, at one shape.

    The products take turns, for about `budget_s` in all, with as few rows as that needs. A CPU
    without the instructions can be hundreds of times slower: a tiny product then says enough.
    """
    affordable = int(_TIMED_PRODUCTS / (width_in * width_out))
    found = _speedup(dtype, 16, 256, 256, budget_s / 5)
    if found > 0.25:
        found = _speedup(dtype, max(16, min(rows, affordable)), width_in, width_out, budget_s)
    return found


def _speedup(
    dtype: torch.dtype, rows: int, width_in: int, width_out: int, budget_s: float
) -> float:
    left_RI, right_IO = torch.ones(rows, width_in), torch.ones(width_in, width_out)
    pairs = [(left_RI, right_IO), (left_RI.to(dtype), right_IO.to(dtype))]
    for left, right in pairs:  # the first product of a shape also prepares it
        torch.mm(left, right)
    best = [_seconds(*pair) for pair in pairs]
    end = time.perf_counter() + budget_s - sum(best)
    while time.perf_counter() < end:
        best = [min(b, _seconds(*pair)) for b, pair in zip(best, pairs, strict=True)]
    return best[0] / best[1]


def _seconds(left: torch.Tensor, right: torch.Tensor) -> float:
    start = time.perf_counter()
    torch.mm(left, right)
    return time.perf_counter() - start


def make_matmuls(
    hidden_ND: torch.Tensor, weight_VD: torch.Tensor, bias_V: torch.Tensor | None
) -> NativeMatmuls:
    """The products for the device and dtype of the input."""
    if hidden_ND.device.type == "cpu" and not multiplies_fast(hidden_ND.dtype):
        return UpcastMatmuls(hidden_ND, weight_VD, bias_V)
    return NativeMatmuls(hidden_ND, weight_VD, bias_V)


class NativeMatmuls:
    """Products in the dtype of the input, sums over chunks in float32."""

    def __init__(
        self, hidden_ND: torch.Tensor, weight_VD: torch.Tensor, bias_V: torch.Tensor | None
    ) -> None:
        self.weight_VD, self.bias_V = weight_VD, bias_V
        self.dtype = hidden_ND.dtype  # of logits
        self.acc_dtype = statistics_dtype(hidden_ND.dtype)

    def buffer(self, num_rows: int) -> torch.Tensor:
        """Uninitialised logits of a chunk; on a GPU rows start at multiples of 16 numbers."""
        num_columns = len(self.weight_VD)
        multiple = 16 if self.weight_VD.is_cuda else 1
        stride = -(-num_columns // multiple) * multiple
        return self.weight_VD.new_empty(num_rows, stride, dtype=self.dtype)[:, :num_columns]

    def logits(self, hidden_BD: torch.Tensor, out_BV: torch.Tensor) -> None:
        """Write the logits of some rows."""
        if self.bias_V is None:
            torch.mm(hidden_BD, self.weight_VD.t(), out=out_BV)
        else:
            torch.addmm(self.bias_V, hidden_BD, self.weight_VD.t(), out=out_BV)

    def grad_hidden(self, dlogits_BV: torch.Tensor, out_BD: torch.Tensor) -> None:
        """Write the gradient of some rows of hidden."""
        torch.mm(dlogits_BV, self.weight_VD, out=out_BD)

    def add_grad_weight(
        self, total_VD: torch.Tensor, dlogits_BV: torch.Tensor, hidden_BD: torch.Tensor, first: bool
    ) -> None:
        """Add the gradient of the weight from some rows to `total_VD`; the first is written."""
        left_VB = dlogits_BV.t()
        if total_VD.dtype == hidden_BD.dtype:
            beta = 0 if first else 1
            torch.addmm(total_VD, left_VB, hidden_BD, beta=beta, out=total_VD)
        elif total_VD.is_cuda and first:
            torch.mm(left_VB, hidden_BD, out_dtype=total_VD.dtype, out=total_VD)
        elif total_VD.is_cuda:
            torch.addmm(total_VD, left_VB, hidden_BD, out_dtype=total_VD.dtype, out=total_VD)
        elif first:
            total_VD.copy_(torch.mm(left_VB, hidden_BD))
        else:
            total_VD += torch.mm(left_VB, hidden_BD)


class UpcastMatmuls(NativeMatmuls):
    """The same in float32, the weight cast block by block."""

    def __init__(
        self, hidden_ND: torch.Tensor, weight_VD: torch.Tensor, bias_V: torch.Tensor | None
    ) -> None:
        super().__init__(hidden_ND, weight_VD, bias_V)
        self.dtype = self.acc_dtype
        rows = max(1, BLOCK_ELEMENTS // max(weight_VD.shape[1], 1))
        self._block = weight_VD.new_empty(
            min(rows, len(weight_VD)), weight_VD.shape[1], dtype=self.acc_dtype
        )
        starts = range(0, len(weight_VD), len(self._block) or 1)
        self._columns = [slice(start, start + len(self._block)) for start in starts]

    def _upcast(self, columns: slice) -> torch.Tensor:
        part = self.weight_VD[columns]
        return self._block[: len(part)].copy_(part)

    def logits(self, hidden_BD: torch.Tensor, out_BV: torch.Tensor) -> None:
        """Write the logits of some rows."""
        float32_BD = hidden_BD.to(self.acc_dtype)
        for columns in self._columns:
            torch.mm(float32_BD, self._upcast(columns).t(), out=out_BV[:, columns])
        if self.bias_V is not None:
            out_BV += self.bias_V

    def grad_hidden(self, dlogits_BV: torch.Tensor, out_BD: torch.Tensor) -> None:
        """Write the gradient of some rows of hidden."""
        total_BD = out_BD.new_zeros(out_BD.shape, dtype=self.acc_dtype)
        for columns in self._columns:
            total_BD.addmm_(dlogits_BV[:, columns], self._upcast(columns))
        out_BD.copy_(total_BD)

    def add_grad_weight(
        self, total_VD: torch.Tensor, dlogits_BV: torch.Tensor, hidden_BD: torch.Tensor, first: bool
    ) -> None:
        """Add the gradient of the weight from some rows; the first is written."""
        float32_BD = hidden_BD.to(self.acc_dtype)
        for columns in self._columns:
            part_VD = total_VD[columns]
            if part_VD.dtype == self.acc_dtype:
                part_VD.addmm_(dlogits_BV[:, columns].t(), float32_BD, beta=0 if first else 1)
                continue
            buffer_VD = self._block[: len(part_VD)]
            part_VD.copy_(torch.mm(dlogits_BV[:, columns].t(), float32_BD, out=buffer_VD))
