"""How every benchmark here measures, and the rows that it leaves.

A row is one JSON object a line under `benchmarks/results/`: machine, versions, date, command, load
and seed beside the figures, so that a table can be made from rows alone. Times are taken in turn
(`take_turns`: A B C A B C ...), memory in a process of its own (`fresh_process`, `Peak`).
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

Name = TypeVar("Name", bound=Hashable)
RESULTS = Path(__file__).parent / "results"


# ------------------------------------------------------------------------------------- rows


def machine() -> str:
    """Processor, cores, what it multiplies with, memory; and the GPU where torch sees one."""
    info = Path("/proc/cpuinfo")
    text = info.read_text(encoding="utf-8") if info.is_file() else ""
    names = [x.partition(": ")[2] for x in text.splitlines() if x.startswith("model name")]
    words = set(text.split())
    wide = [flag for flag in ("avx2", "avx512f", "amx_bf16") if flag in words]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    name = names[0] if names else platform.machine()
    parts = [f"{os.cpu_count()} x {name}", *wide, f"{memory:.0f} GiB"]
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        parts.insert(0, torch.cuda.get_device_name())
    return ", ".join(parts)


def versions(names: Iterable[str]) -> dict[str, str]:
    """Installed versions of distributions; "-" for one that is not there."""
    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "-"
    return found


def command() -> str:
    """The command that this process was started with, as a reader types it in the repository.

    Where its rows go (`--results`) is no part of it.
    """
    given = iter(sys.argv[1:])
    kept = [x for x in given if not (x == "--results" and next(given, None))]
    threads = os.environ.get("OMP_NUM_THREADS")
    prefix = f"OMP_NUM_THREADS={threads} " if threads else ""
    script = Path(sys.argv[0]).name
    return " ".join([f"{prefix}python benchmarks/{script}", *map(shlex.quote, kept)])


def facts(packages: Iterable[str]) -> dict[str, Any]:
    """What every row says beside its figures; `run` is the same for all rows of one process."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "run": f"{int(_STARTED)}-{os.getpid()}",
        "command": command(),
        "machine": machine(),
        "python": platform.python_version(),
        "versions": versions(packages),
        "load_1min": round(os.getloadavg()[0], 2),  # of the whole machine, this process included
    }


def append(name: str, rows: Sequence[Mapping[str, Any]], folder: Path = RESULTS) -> None:
    """Add rows to `results/<name>.jsonl`."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{name}.jsonl").open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


_STARTED = time.time()


# ------------------------------------------------------------------------------------- time


def take_turns(
    arms: Mapping[Name, Callable[[], Any]],
    *,
    rounds: int,
    warmup: int = 1,
    wait: Callable[[], Any] = lambda: None,
    until: float | None = None,
    clock: Callable[[], float] | None = None,
) -> dict[Name, list[float]]:
    """Seconds of each call, the arms in turn: A B C A B C ...; rounds of warm-up are not kept.

    Args:
        clock: `time.perf_counter` by default; `time.process_time` with one thread on a machine
            that is shared.
        wait: called before and after each call; `torch.cuda.synchronize` on a GPU.
        until: `time.monotonic()` after which no further round begins; one is always made.
    """
    clock = clock or time.perf_counter
    taken: dict[Name, list[float]] = {name: [] for name in arms}
    for turn in range(warmup + rounds):
        if until is not None and turn > warmup and time.monotonic() > until:
            break
        for name, run in arms.items():
            wait()
            start = clock()
            run()
            wait()
            seconds = clock() - start
            if turn >= warmup:
                taken[name].append(seconds)
    return taken


def quantiles(seconds: Sequence[float]) -> dict[str, float]:
    """Quantiles p20, p50 and p80 and the number of times they are of."""
    ordered = sorted(seconds)

    def at(share: float) -> float:
        return ordered[round(share * (len(ordered) - 1))]

    return {
        "p20_s": at(0.2),
        "p50_s": statistics.median(ordered),
        "p80_s": at(0.8),
        "rounds": len(ordered),
    }


def times_faster(slow: Sequence[float], fast: Sequence[float]) -> float:
    """Median over the rounds of slow / fast; the load of one round is the same for both."""
    return statistics.median(s / f for s, f in zip(slow, fast, strict=True))


# ----------------------------------------------------------------------------------- memory


class Peak:
    """Largest resident memory of this process between enter and exit, in bytes, over the start.

    `over_start_bytes` counts all that was resident at the peak and not at the start, by the
    kernel's own high-water mark, which is set back at the start.
    """

    start_bytes: int
    over_start_bytes: int

    def __enter__(self) -> Peak:
        give_back_freed_memory()
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
        self.start_bytes = resident_bytes("VmRSS")
        return self

    def __exit__(self, *_: object) -> None:
        self.over_start_bytes = resident_bytes("VmHWM") - self.start_bytes


def resident_bytes(name: str = "VmRSS") -> int:
    """VmRSS (now) or VmHWM (peak) of this process."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(x.split()[1]) * 1024 for x in lines if x.startswith(f"{name}:"))


def give_back_freed_memory() -> None:
    """Collect garbage and let glibc return free pages, so that a start is not too high."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def fresh_process(arguments: Sequence[str], **environment: str) -> dict[str, Any]:
    """Run `python <arguments>` and read the JSON object of the last line that it prints.

    Raises:
        RuntimeError: the process failed; with the end of what it wrote.
    """
    done = subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        encoding="utf-8",
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(arguments)} failed:\n{done.stderr[-2000:]}")
    last: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return last
