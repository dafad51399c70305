"""Build the Triton kernels for sm_90; prints for each: name, bytes of spills, 16-byte accesses."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path

import triton
import triton.language as tl
from posttrain_kernels.passes import triton_kernels
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TOOL = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
COUNTS = ("row_stride", "num_columns", "readable_columns", "first_column", "vocabulary", "width")
FLOATS = ("logit_scale", "softcap", "z_loss")
WIDE_COUNTS = {"row_stride", "readable_columns", "width"}  # multiples of 16, as for real sizes


def build(name: str, kernel, element: str, warps: int, **flags) -> None:
    def kind(argument: str) -> str:
        if argument in flags:
            return "constexpr"
        if argument in COUNTS or argument in ("column_stride", "height"):
            return "i32"
        if argument in FLOATS:
            return "fp32"
        if argument in ("label_ptr", "rows_ptr", "order_ptr", "first_ptr"):
            return "*i64"
        if argument == "correct_ptr":
            return "*i1"
        sixteen = ("logits_ptr", "values_ptr", "gathered_ptr", "sums_ptr")
        return f"*{element}" if argument in sixteen else "*fp32"

    signature = {argument: kind(argument) for argument in kernel.arg_names}
    constants = dict(flags)
    if "column_stride" in signature:  # Triton takes a 1 as a constant
        signature["column_stride"], constants["column_stride"] = "constexpr", 1
    aligned = {
        (place,): [["tt.divisibility", 16]]
        for place, argument in enumerate(kernel.arg_names)
        if argument in WIDE_COUNTS or signature[argument].startswith("*")
    }
    source = ASTSource(kernel, signature, constants, attrs=aligned)
    target = GPUTarget("cuda", 90, 32)
    built = triton.compile(source, target=target, options={"num_warps": warps})
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [TOOL, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    spilled = sum(int(size) for size in re.findall(r"LOCAL:(\d+)", usage))
    print(name, spilled, len(re.findall(r"\.v4\.", built.asm["ptx"])))


for element, capped, mode in (
    ("bf16", False, "whole"),
    ("bf16", True, "whole"),
    ("bf16", False, "parts"),
    ("bf16", True, "rest"),
    ("fp16", False, "whole"),
):
    build(
        f"row_{element}_{capped}_{mode}",
        triton_kernels._row_kernel,
        element,
        triton_kernels.ROW_WARPS,
        CAPPED=capped,
        READ=mode != "rest",
        PARTS=mode != "whole",
        FILL=mode != "parts",
        ENTROPY=True,
        GRADIENT=mode != "parts",
        ENTROPY_GRADIENT=capped,
        ACC_DTYPE=tl.float32,
        BLOCK=triton_kernels.BLOCK_COLUMNS,
    )
block = triton_kernels.COPY_COLUMNS
build("gather", triton_kernels._gather_kernel, "bf16", 4, BLOCK=block)
build("scatter", triton_kernels._scatter_kernel, "bf16", 4, BLOCK=block)
