"""The GPUs of this node as nvidia-smi has them: how many, their memory, ECC, what was remapped."""

from __future__ import annotations

import csv
import os
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field

TIMEOUT_S = 30.0  # nvidia-smi of a GPU that is gone may never answer
_FIELDS = (
    "index",
    "uuid",
    "name",
    "memory.total",
    "memory.used",
    "ecc.errors.uncorrected.volatile.total",
    "driver_version",
)
_REMAPPED = ("gpu_uuid", "remapped_rows.pending", "remapped_rows.failure")
_XIDS_SHOWN = 3


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU; None: its driver does not say."""

    index: int
    name: str
    memory_mib: int | None
    used_mib: int | None
    uncorrected_ecc: int | None  # errors since the driver was loaded
    remap_pending: bool = False  # a row of its memory waits for a reset
    remap_failed: bool = False


@dataclass(frozen=True, slots=True)
class GpuState:
    """The GPUs that a job has of this node."""

    count: int
    gpus: list[Gpu] = field(default_factory=list)  # empty where there is no nvidia-smi
    driver: str | None = None
    fault: str | None = None  # why nvidia-smi gave no answer
    xids: list[str] = field(default_factory=list)  # the newest errors in the kernel's log


def look_at_gpus(environment: Mapping[str, str]) -> GpuState:
    """The GPUs that the job sees on this node.

    Args:
        environment: of the job: CUDA_VISIBLE_DEVICES, SLURM_GPUS_ON_NODE.
    """
    visible = _visible(environment)
    if shutil.which("nvidia-smi") is None:
        given = environment.get("SLURM_GPUS_ON_NODE", "")
        count = len(visible) if visible is not None else int(given) if given.isdigit() else 0
        return GpuState(count)
    rows, fault = _query("gpu", _FIELDS)
    if fault:
        return GpuState(0, fault=fault, xids=_xids())
    if visible and visible[0].startswith("MIG-"):  # a part of a GPU, which the table has not
        return GpuState(len(visible), driver=rows[0][-1] if rows else None)
    rows = _rows_of_job(rows, visible)
    remapped = {
        uuid: (pending, failed) for uuid, pending, failed in _query("remapped-rows", _REMAPPED)[0]
    }
    gpus = [_gpu(row, *remapped.get(row[1], ("", ""))) for row in rows]
    return GpuState(len(gpus), gpus, rows[0][-1] if rows else None, xids=_xids() if gpus else [])


def _visible(environment: Mapping[str, str]) -> list[str] | None:
    text = environment.get("CUDA_VISIBLE_DEVICES")
    if text is None or text == "all":
        return None
    return [each.strip() for each in text.split(",") if each.strip() not in ("", "NoDevFiles")]


def _rows_of_job(rows: list[list[str]], visible: list[str] | None) -> list[list[str]]:
    """Those that CUDA_VISIBLE_DEVICES names, by index or UUID.

    Where the job's cgroup hides the others, nvidia-smi may count from 0, and the variable not.
    """
    if visible is None:
        return rows
    named = [row for row in rows if row[0] in visible or row[1] in visible]
    return rows if not named and len(rows) == len(visible) else named


def _query(what: str, names: tuple[str, ...]) -> tuple[list[list[str]], str | None]:
    """Rows of nvidia-smi's table, and why there are none."""
    command = ["nvidia-smi", f"--query-{what}={','.join(names)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            encoding="utf-8",
            check=False,
            timeout=TIMEOUT_S,
            errors="replace",
        )
    except subprocess.TimeoutExpired:
        return [], f"gives no answer in {TIMEOUT_S:.0f} s"
    except OSError as error:
        return [], f"does not start: {error.strerror}"
    if done.returncode != 0:
        words = " ".join((done.stdout + done.stderr).split())
        return [], words[:300] or f"ends with exit code {done.returncode}"
    rows = list(csv.reader(done.stdout.splitlines(), skipinitialspace=True))
    return [row for row in rows if len(row) == len(names)], None


def _gpu(row: list[str], pending: str, failed: str) -> Gpu:
    index, _, name, memory, used, ecc, _ = row
    return Gpu(
        int(index),
        name,
        _number(memory),
        _number(used),
        _number(ecc),
        remap_pending=pending.lower() in ("yes", "1"),
        remap_failed=failed.lower() in ("yes", "1"),
    )


def _number(text: str) -> int | None:
    """A cell; `[N/A]` and its like are None."""
    return int(text) if text.strip().isdigit() else None


def _xids() -> list[str]:
    """The newest Xid errors of the kernel's log, where this user may read it."""
    if shutil.which("dmesg") is None:
        return []
    try:
        done = subprocess.run(
            ["dmesg"],
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            check=False,
            timeout=5,
        )
    except (OSError, subprocess.TimeoutExpired):
        return []
    lines = [line for line in done.stdout.splitlines() if "NVRM: Xid" in line]
    return lines[-_XIDS_SHOWN:]


def current_gpus() -> GpuState:
    """Those of this process's own job."""
    return look_at_gpus(os.environ)
