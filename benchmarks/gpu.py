"""Everything that only a GPU can tell, in one command of at most 8 minutes on one H100.

    python benchmarks/gpu.py            # --smoke: the same on a CPU with tiny shapes

First the kernels against float64 truth at odd shapes, then the output head at the shapes of an 8B
model side by side with the peers that are installed, then whole steps of a 3B model in full and of
an 8B one with LoRA, beside TRL's where it is installed. Nothing is downloaded or installed;
posttrain-dist need not be installed either, but torch, triton, transformers, peft, omegaconf and
what else it imports must be. Each section has a share of the time and begins nothing after it. The
table comes last; one row per line of it goes to benchmarks/results/gpu.jsonl. The exit status is 1
if a kernel is wrong or an arm of ours fails.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
for package, folder in (("posttrain_dist", ROOT), ("posttrain_kernels", ROOT / "kernels")):
    if find_spec(package) is None:
        sys.path.insert(0, str(folder))
        # ... and for the processes of whole steps
        before = os.environ.get("PYTHONPATH")
        os.environ["PYTHONPATH"] = f"{folder}{os.pathsep}{before}" if before else str(folder)

import gpu_steps  # noqa: E402
import head  # noqa: E402
import rows  # noqa: E402
import torch  # noqa: E402

PACKAGES = ("torch", "triton", "transformers", "peft", "trl", "liger-kernel", "cut-cross-entropy")
SECONDS = {"kernels": 40, "head": 150, "steps": 210}  # the rest of 8 minutes: what has begun ends

# N, D, V, masked, softcap: nothing here divides by a tile of a kernel.
ODD_SHAPES = (
    (1, 64, 257, 0.0, None),
    (77, 96, 1001, 0.5, None),
    (1000, 520, 32_003, 0.3, None),
    (513, 128, 50_257, 0.9, 30.0),
    (256, 1024, 128_256, 0.0, None),
)


# --------------------------------------------------------------------------- kernels


def check_kernels(device: str, smoke: bool, until: float) -> list[dict[str, Any]]:
    """Errors of ours and of torch eager against float64, in loss and gradients."""
    table = []
    dtypes = (torch.float32,) if smoke else (torch.float32, torch.bfloat16)
    for shape in ODD_SHAPES[:2] if smoke else ODD_SHAPES:
        for dtype in dtypes:
            if time.monotonic() > until:
                spent = "the time of this section was spent"
                return [*table, {"arm": f"{len(table)} checked", "skipped": spent}]
            table.append(check_one(*shape, dtype, device))
    return table


def check_one(
    num: int,
    hidden_size: int,
    vocabulary: int,
    masked: float,
    softcap: float | None,
    dtype: torch.dtype,
    device: str,
) -> dict[str, Any]:
    """One shape; wrong where ours is more than 1.5 times as far from the truth as eager is."""
    from head_arms import make_problem, mask
    from posttrain_kernels import linear_cross_entropy

    problem = mask(
        make_problem(num, hidden_size, vocabulary, trainable=True, dtype=dtype, device=device),
        masked,
    )
    count = max(1, len(problem.supervised))

    def eager(dtype: torch.dtype) -> list[torch.Tensor]:
        hidden = problem.hidden_ND.detach().to(dtype).requires_grad_()
        weight = problem.weight_VD.detach().to(dtype).requires_grad_()
        logits = torch.nn.functional.linear(hidden[problem.supervised], weight)
        logits = logits.to(torch.promote_types(dtype, torch.float32))
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        loss = torch.nn.functional.cross_entropy(logits, problem.targets, reduction="sum") / count
        loss.backward()
        return [x.double() for x in (loss.detach(), hidden.grad, weight.grad) if x is not None]

    impl = "triton" if device != "cpu" else "torch"
    result = linear_cross_entropy(
        problem.hidden_ND,
        problem.weight_VD,
        problem.targets,
        supervised=problem.supervised,
        denominator=float(count),
        softcap=softcap,
        impl=impl,
    )
    result.loss.backward()
    made = [result.loss.detach(), problem.hidden_ND.grad, problem.weight_VD.grad]
    truth = eager(torch.float64)
    own = [apart(x.double(), t) for x, t in zip(made, truth, strict=True) if x is not None]
    theirs = [apart(x, t) for x, t in zip(eager(dtype), truth, strict=True)]
    least = 1e-6 if dtype == torch.float32 else 1e-3
    wrong = len(own) != 3 or any(a > max(1.5 * b, least) for a, b in zip(own, theirs, strict=True))
    return {
        "arm": impl,
        "rows": num,
        "hidden": hidden_size,
        "vocabulary": vocabulary,
        "masked": masked,
        "softcap": softcap,
        "dtype": str(dtype).removeprefix("torch."),
        **dict(zip(("loss_error", "hidden_error", "weight_error"), own, strict=False)),
        **dict(zip(("eager_loss", "eager_hidden", "eager_weight"), theirs, strict=True)),
        "wrong": wrong,
    }


def apart(got: torch.Tensor, true: torch.Tensor) -> float:
    """Relative distance in the 2-norm."""
    return float((got - true).norm() / true.norm().clamp_min(1e-30))


# ------------------------------------------------------------------------------ head


def measure_heads(device: str, smoke: bool, until: float) -> list[dict[str, Any]]:
    """8B shapes: two row counts, trainable and frozen, three masks, every arm that is here."""
    table: list[dict[str, Any]] = []
    cases = [(num, frozen) for frozen in (False, True) for num in (8192, 16_384)]
    for done, (num, frozen) in enumerate(cases):
        now = time.monotonic()
        case = {"rows": num, "head": "frozen" if frozen else "trainable"}
        if now > until:
            table.append({**case, "arm": "all", "skipped": "the time of this section was spent"})
            continue
        arguments = argparse.Namespace(
            rows=num // 256 if smoke else num,
            hidden=32 if smoke else 4096,
            vocabulary=256 if smoke else 128_256,
            masks=[0.0, 0.75, 0.9],
            dtype="float32" if smoke else "bfloat16",
            device=device,
            frozen=frozen,
            # Compiling again for every shape would take the time of everything else.
            arms=[a for a in head.ARMS if a != "torch.compile" or (num == 8192 and not smoke)],
            rounds=1 if smoke else 10,
            memory_masks=[] if smoke else [0.0, 0.75, 0.9],
        )
        table += head.measure(arguments, until=now + (until - now) / (len(cases) - done))
    return table


# ------------------------------------------------------------------------------ main


def section(
    name: str, make: Callable[[str, bool, float], list[dict[str, Any]]], device: str, smoke: bool
) -> list[dict[str, Any]]:
    """The rows of one section; one that breaks off says so and leaves the others their turn."""
    start = time.monotonic()
    print(f"{name} ...", flush=True)
    try:
        table = make(device, smoke, start + SECONDS[name])
    except Exception as error:
        traceback.print_exc()
        said = (str(error).splitlines() or [""])[0]
        table = [{"arm": "ours", "failed": f"{type(error).__name__}: {said}"}]
    print(f"{name}: {time.monotonic() - start:.0f} s", flush=True)
    if device != "cpu":
        gc.collect()
        torch.cuda.empty_cache()
    return [{"section": name, **row} for row in table]


def lines(table: list[dict[str, Any]]) -> list[str]:
    """The printed table: one line a kernel check or step, one a head case with all its arms."""
    said: list[str] = []
    cases: dict[str, list[str]] = {}
    reasons: dict[str, str] = {}
    for row in table:
        reason = row.get("skipped", row.get("failed"))
        if reason is not None and row["section"] == "head":
            reasons[row["arm"]] = reason
        elif reason is not None:
            what = " ".join(str(row.get(k, "")) for k in ("section", "model", "kind", "arm"))
            said.append(f"{what}: {reason}")
        elif row["section"] == "head":
            key = f"N={row['rows']} {row['head']} {row['masked']:.0%} masked"
            cases.setdefault(key, []).append(head_cell(row))
        elif row["section"] == "kernels":
            said.append(kernel_line(row))
        else:
            said.append(step_line(row))
    said += [f"{key}: {'; '.join(cells)}" for key, cells in cases.items()]
    return said + [f"not run: {arm}: {reason}" for arm, reason in reasons.items()]


def kernel_line(row: dict[str, Any]) -> str:
    """Errors of ours, and eager's in parentheses."""
    pairs = [
        f"{name} {row[f'{name}_error']:.0e} ({row[f'eager_{name}']:.0e})"
        for name in ("loss", "hidden", "weight")
        if f"{name}_error" in row
    ]
    shape = f"{row['rows']}x{row['hidden']}x{row['vocabulary']} softcap {row['softcap']}"
    wrong = "WRONG " if row["wrong"] else ""
    return (
        f"{wrong}{row['arm']} {shape} {row['dtype']} {row['masked']:.0%} masked: {', '.join(pairs)}"
    )


def head_cell(row: dict[str, Any]) -> str:
    """Time, what of the floor, how many times ours, extra memory."""
    parts = [f"{row['share_of_floor']:.2f} floor", f"{row.get('ours_times_faster', 0):.2f}x"]
    if "peak_extra_bytes" in row:
        parts.append(f"{row['peak_extra_bytes'] / 2**20:.0f}M")
    return f"{row['arm']} {row['p50_s'] * 1e3:.1f} ms ({', '.join(parts)})"


def step_line(row: dict[str, Any]) -> str:
    """Time, throughput, utilisation, memory."""
    mfu = "-" if row["mfu"] is None else f"{row['mfu']:.1%}"
    return (
        f"{row['model']} {row['kind']}: {row['arm']} {row['p50_s']:.3f} s "
        f"({row.get('ours_times_faster', 0):.2f}x), {row['tokens_per_s']:.0f} tokens/s, MFU {mfu}, "
        f"{row['peak_bytes'] / 2**30:.1f} GiB, loss {row['losses'][-1]:.3f} "
        f"({row.get('loss_apart', 0):.0e} apart), gradient norm {row['norms'][-1]:.3f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, on a CPU too")
    parser.add_argument("--results", type=Path, default=rows.RESULTS)
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not arguments.smoke:
        raise SystemExit("there is no GPU here; --smoke runs the same with tiny shapes on a CPU")
    warnings.filterwarnings("ignore")
    table = section("kernels", check_kernels, device, arguments.smoke)
    table += section("head", measure_heads, device, arguments.smoke)
    table += section("steps", gpu_steps.all_steps, device, arguments.smoke)
    facts = {**rows.facts(PACKAGES), "smoke": arguments.smoke}
    rows.append("gpu", [{**facts, **row} for row in table], arguments.results)
    print(f"\n{facts['machine']}; {facts['versions']}\n")
    print("\n".join(lines(table)))
    broken = [r for r in table if r.get("wrong") or (r["arm"].startswith("ours") and "failed" in r)]
    raise SystemExit(1 if broken else 0)


if __name__ == "__main__":
    main()
