"""What this machine has: GPUs, memory, CPUs, network. Asked of the system, never of torch."""

from __future__ import annotations

import csv
import io
import logging
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from posttrain_dist.config.cluster import Cluster, Ray, Slurm
from posttrain_dist.config.devices import MIB, find_device
from posttrain_dist.config.hardware import Hardware
from posttrain_dist.errors import ClusterError

_log = logging.getLogger(__name__)
_QUERY = ("index", "uuid", "name", "memory.total", "memory.reserved", "compute_cap")
_TIMEOUT_S = 20.0  # a driver that is not held loaded takes seconds for each GPU


@dataclass(frozen=True, slots=True, kw_only=True)
class ThisMachine:
    """What processes that are started here can have.

    Attributes:
        gpu: name in the table of devices; None: no GPU.
        product: as nvidia-smi calls it.
        gpu_memory_bytes: of each GPU, without what the driver keeps.
        network_bytes_s: of the whole machine to others; None: not known.
    """

    gpu: str | None
    product: str
    gpus: int
    gpu_memory_bytes: int
    host_memory_bytes: int
    cpus: int
    network_bytes_s: float | None

    @property
    def sentence(self) -> str:
        """What is here, as the end of a sentence."""
        host = f"{self.cpus} CPUs and {self.host_memory_bytes / (1 << 30):.1f} GiB"
        if self.gpu is None:
            return f"no GPU, {host}"
        memory = f"{self.gpu_memory_bytes / (1 << 30):.1f} GiB"
        return f"{self.gpus} x {self.product} with {memory} each, {host}"


def look_here(root: Path = Path("/")) -> ThisMachine:
    """Look up what is here.

    Args:
        root: in which /proc and /sys lie.

    Raises:
        ClusterError: the GPUs differ, or nvidia-smi is there and fails.
    """
    gpus = _gpus()
    first = gpus[0] if gpus else None
    name = None
    if first is not None:
        name, known = find_device(first.product, first.total_mib, first.compute_capability)
        if not known:
            _log.warning("%s is not in the table of devices; planned as %s", first.product, name)
    return ThisMachine(
        gpu=name,
        product=first.product if first else "",
        gpus=len(gpus),
        gpu_memory_bytes=min((gpu.usable_mib for gpu in gpus), default=0) * MIB,
        host_memory_bytes=host_memory_bytes(root),
        cpus=cpus_here(root),
        network_bytes_s=_network_bytes_s(root),
    )


def trains_here(cluster: Cluster) -> bool:
    """Whether the workers are processes of this machine alone, and not of a cluster."""
    joins = isinstance(cluster, Ray) and bool(cluster.address or os.environ.get("RAY_ADDRESS"))
    return not isinstance(cluster, Slurm) and not joins


def check_hardware(hardware: Hardware, cluster: Cluster, here: ThisMachine | None = None) -> None:
    """Refuse a training on this machine with a group `hardware` that describes another.

    Args:
        here: what this machine has, where that was looked up before.

    Raises:
        ClusterError: other GPUs, more of them or with more memory, or none.
    """
    if not trains_here(cluster) or not (hardware.gpu or hardware.gpus_per_node):
        return
    here = here or look_here()
    memory = (hardware.gpu_memory_gib or 0.0) * (1 << 30)
    wrong = ""
    if here.gpu is None or hardware.gpu not in (None, here.gpu):
        wrong = f"is {hardware.gpu or 'of GPUs'}"
    elif (hardware.gpus_per_node or 0) > here.gpus:
        wrong = f"has {hardware.gpus_per_node} GPUs in a node"
    elif memory > 1.02 * here.gpu_memory_bytes:
        wrong = f"has {hardware.gpu_memory_gib} GiB in a GPU"
    if wrong:
        raise ClusterError(
            f"{wrong}, and the training would start on this machine, which has {here.sentence}",
            where="hardware",
            fix="leave hardware out: it is looked up; `posttrain plan` plans for any hardware, and "
            "cluster=slurm, or cluster=ray cluster.address=<host:port>, trains elsewhere",
        )


# ------------------------------------------------------------------------------------ GPUs


@dataclass(frozen=True, slots=True)
class _Gpu:
    index: str
    uuid: str
    product: str
    total_mib: int
    usable_mib: int
    compute_capability: float


def _gpus() -> list[_Gpu]:
    """The GPUs that a program started here sees."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    command = [program, f"--query-gpu={','.join(_QUERY)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            check=False,
            timeout=_TIMEOUT_S,
            encoding="utf-8",
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise _unreadable(str(error)) from error
    if done.returncode != 0:
        answer = (done.stdout.strip() or done.stderr.strip()).replace("\n", " ")
        if "No devices were found" in answer:
            return []
        raise _unreadable(answer)
    seen = _visible([_parse(row) for row in csv.reader(io.StringIO(done.stdout)) if row])
    products = {gpu.product for gpu in seen}
    if len(products) > 1:
        raise ClusterError(
            f"has GPUs that differ: {', '.join(sorted(products))}",
            where="hardware",
            fix="set CUDA_VISIBLE_DEVICES to those of one kind",
        )
    return seen


def _parse(row: list[str]) -> _Gpu:
    try:
        index, uuid, product, total, reserved, capability = (cell.strip() for cell in row)
        kept = int(reserved) if reserved.isdigit() else 0  # "[N/A]" of older drivers
        return _Gpu(index, uuid, product, int(total), int(total) - kept, float(capability))
    except ValueError as error:
        raise _unreadable(f"answers {', '.join(row)!r}") from error


def _visible(gpus: list[_Gpu]) -> list[_Gpu]:
    """Those that CUDA_VISIBLE_DEVICES leaves; the first name that is none ends the list."""
    names = os.environ.get("CUDA_VISIBLE_DEVICES")
    if names is None:
        return gpus
    seen = []
    for name in (each.strip() for each in names.split(",")):
        match = [g for g in gpus if name and (g.index == name or g.uuid.startswith(name))]
        if len(match) != 1:
            break
        seen += match
    return seen


def _unreadable(answer: str) -> ClusterError:
    return ClusterError(
        f"nvidia-smi cannot be asked which GPUs are here: {answer}",
        where="hardware",
        fix="make `nvidia-smi` work, or set hardware=<a preset> for a plan, or CUDA_VISIBLE_DEVICES"
        "='' and take nvidia-smi off PATH to train on CPUs",
    )


# ------------------------------------------------------------------------------------ host


def host_memory_bytes(root: Path = Path("/")) -> int:
    """Memory of this machine, or of the container or job that this process is in, if less."""
    info = _read(root / "proc/meminfo")
    total = int(info.partition("MemTotal:")[2].split()[0]) * 1024 if "MemTotal:" in info else 0
    limits = [total] if total else []
    for folder in _cgroups(root, "memory"):
        for name in ("memory.max", "memory.limit_in_bytes"):
            text = _read(folder / name).strip()
            if text.isdigit():
                limits.append(int(text))
    return min(limits, default=0)


def cpus_here(root: Path = Path("/")) -> int:
    """CPUs that this process may use: its affinity, and the quota of its control group."""
    counts = [float(len(os.sched_getaffinity(0)))]
    for folder in _cgroups(root, "cpu"):
        quota, _, period = _read(folder / "cpu.max").strip().partition(" ")
        if not quota:
            quota = _read(folder / "cpu.cfs_quota_us").strip()
            period = _read(folder / "cpu.cfs_period_us").strip()
        if quota.isdigit() and period.isdigit() and int(period):
            counts.append(int(quota) / int(period))
    return max(1, int(min(counts)))


def _cgroups(root: Path, controller: str) -> list[Path]:
    """Folders of the control groups that this process is in, from its own up to the root."""
    found: list[Path] = []
    mount = root / "sys/fs/cgroup"
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers and controller not in controllers.split(","):
            continue
        base = mount / controller if controllers else mount
        folder = base / path.lstrip("/")
        found += [folder, *(p for p in folder.parents if p == base or base in p.parents)]
    # In a container the path is that of the host, and only the mount's root is there.
    return list(dict.fromkeys(found))


def _network_bytes_s(root: Path) -> float | None:
    """The fastest network: all InfiniBand ports together, else the fastest Ethernet link."""
    ports = [_read(p) for p in root.glob("sys/class/infiniband/*/ports/*/rate")]  # "400 Gb/sec ..."
    rates = [float(text.split()[0]) for text in ports if text.split()]
    if rates:
        return sum(rates) * 1e9 / 8
    speeds = [_read(p).strip() for p in root.glob("sys/class/net/*/speed")]  # Mb/s; -1: none
    return max((int(s) for s in speeds if s.isdigit()), default=0) * 1e6 / 8 or None


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""
