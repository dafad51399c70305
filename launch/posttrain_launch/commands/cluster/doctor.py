"""`posttrain doctor`: one line for each thing that a run needs, with a fix where it is missing."""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import io
import netrc
import os
import platform
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from posttrain_launch.commands.arguments import parser_of

GIB = 2**30


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the table."""

    state: Literal["ok", "warn", "fail"]
    what: str
    found: str
    fix: str = ""


def command(arguments: list[str], debug: bool) -> int:
    """Print the table; exit code 1 if something that every run needs is missing."""
    parser_of("doctor").parse_args(arguments)
    failed = False
    for check in CHECKS:
        with contextlib.redirect_stderr(io.StringIO()):  # what libraries say when imported
            found = check()
        failed |= found.state == "fail"
        print(f"{found.state:<4}  {found.what:<14}  {found.found}")
        if found.fix:
            print(f"{'':<22}fix: {found.fix}", flush=True)
    print("\nsomething is missing" if failed else "\nready: try `posttrain train`")
    return int(failed)


# ----------------------------------------------------------------------------- the machine


def _python() -> Finding:
    return Finding("ok", "python", f"{platform.python_version()}  {sys.executable}")


def _cpu() -> Finding:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    import torch
    from posttrain_kernels import multiplies_fast

    fast = multiplies_fast(torch.bfloat16)
    speed = "multiplied by instructions of its own" if fast else "slow: auto takes float32"
    return Finding("ok", "cpu", f"{cores} cores; bfloat16 is {speed}")


def _memory() -> Finding:
    info = Path("/proc/meminfo")
    if not info.is_file():
        return Finding("warn", "memory", "cannot be read on this system")
    sizes = {
        line.split(":")[0]: int(line.split()[1]) * 1024
        for line in info.read_text(encoding="utf-8").splitlines()
    }
    free, total = sizes.get("MemAvailable", 0), sizes.get("MemTotal", 0)
    found = f"{free / GIB:.1f} GiB free of {total / GIB:.1f} GiB"
    if free < 4 * GIB:
        return Finding("warn", "memory", found, "the demo wants 4 GiB; try cluster=local")
    return Finding("ok", "memory", found)


def _space(what: str, folder: Path, least: float, fix: str) -> Finding:
    if not folder.is_dir():
        return Finding("warn", what, f"there is no {folder}", fix)
    free = shutil.disk_usage(folder).free
    found = f"{free / GIB:.1f} GiB free in {folder}"
    enough = free >= least and os.access(folder, os.W_OK)
    return Finding("ok", what, found) if enough else Finding("warn", what, found, fix)


def _disk() -> Finding:
    fix = "checkpoints are 12 bytes a parameter and more: set output_root to a larger disk"
    return _space("disk", Path.cwd(), 5 * GIB, fix)


def _shared_memory() -> Finding:
    fix = "Ray and NCCL use /dev/shm; in a container give it --shm-size=8g"
    return _space("shared memory", Path("/dev/shm"), GIB / 2, fix)


# ---------------------------------------------------------------------------- the packages


def _torch() -> Finding:
    try:
        import torch
    except ImportError as error:
        return Finding("fail", "torch", str(error), "pip install torch")
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU build"
    if devices:
        return Finding("ok", "torch", f"{torch.__version__}, {build}: {', '.join(devices)}")
    found = f"{torch.__version__}, {build}: no GPU seen"
    if torch.version.cuda or shutil.which("nvidia-smi"):
        fix = "check `nvidia-smi`, CUDA_VISIBLE_DEVICES, and that torch is a CUDA build"
        return Finding("warn", "torch", found, fix)
    return Finding("ok", "torch", f"{found}; training runs on the CPU")


def _package(name: str, module: str | None = None) -> Callable[[], Finding]:
    def check() -> Finding:
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                importlib.import_module(module or name)
            return Finding("ok", name, importlib.metadata.version(name))
        except Exception as error:  # whatever a broken install raises
            return Finding("fail", name, f"{type(error).__name__}: {error}", f"pip install {name}")

    return check


def _compiler() -> Finding:
    # A venv that is not activated has its bin folder off PATH.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    missing = [tool for tool in ("g++", "ninja") if shutil.which(tool, path=path) is None]
    if missing:
        return Finding(
            "warn",
            "compiler",
            f"no {' and no '.join(missing)}: needed by engine=zero3_offload on a GPU only",
            "install g++ (Debian: apt-get install g++) and ninja (pip install ninja)",
        )
    return Finding("ok", "compiler", "g++ and ninja")


# ---------------------------------------------------------------------------- the services


def _wandb_key() -> Finding:
    if os.environ.get("WANDB_API_KEY"):
        return Finding("ok", "W&B", "WANDB_API_KEY is set: runs go online")
    try:
        hosts: Any = netrc.netrc().hosts
    except (OSError, netrc.NetrcParseError):
        hosts = {}
    if "api.wandb.ai" in hosts:
        return Finding("ok", "W&B", "key in netrc: runs go online")
    return Finding("ok", "W&B", "no key: runs are recorded offline (`wandb sync` sends them)")


def _slurm() -> Finding:
    if shutil.which("sbatch"):
        return Finding("ok", "Slurm", f"{shutil.which('sbatch')}: `posttrain submit` works here")
    return Finding("ok", "Slurm", "no sbatch: `posttrain submit --dry-run` still writes the job")


CHECKS: tuple[Callable[[], Finding], ...] = (
    _python,
    _cpu,
    _memory,
    _disk,
    _shared_memory,
    _torch,
    _package("transformers"),
    _package("safetensors"),
    _package("deepspeed"),
    _package("ray", "ray.train"),
    _package("hydra-core", "hydra"),
    _package("wandb"),
    _compiler,
    _wandb_key,
    _slurm,
)
