"""Every number and word of a plan that is shown, from its JSON, for terminal and page alike.

The JSON is that of `posttrain plan --json`: bytes, seconds and counts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from posttrain_dist.report import numbers

TINY = 50  # times smaller than the capacity: too small to be seen beside it
BILLION = 1e9  # tokens, where the data is not known


@dataclass(frozen=True, slots=True)
class Bar:
    """One line of a list: what, how much of it, and the length of its bar, 0 to 1."""

    name: str
    text: str
    share: float
    note: str = ""


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether it fits, in one line, and by how much or by which item it does not."""

    fits: bool
    title: str
    text: str


def device_word(plan: Mapping[str, Any], count: int = 1) -> str:
    """`GPU` or, of a run on CPUs, `rank`."""
    word = "GPU" if plan["on_gpu"] else "rank"
    return word if count == 1 else f"{word}s"


def verdict_of(plan: Mapping[str, Any]) -> Verdict:
    """Where it is tightest decides; the item named is the one that takes most there."""
    spare, host_spare = plan["spare_bytes"], plan["host_spare_bytes"]
    device = device_word(plan)
    if plan["fits"]:
        title = f"fits: {numbers.memory(spare)} of each {device} to spare{beyond_margin(plan)}"
        text = f"each host has {numbers.memory(host_spare)} of its memory left"
        return Verdict(True, title, text)
    missing = []
    if spare < 0:
        missing.append(f"each {device} lacks {numbers.memory(-spare)}")
    if host_spare < 0:
        missing.append(f"each host lacks {numbers.memory(-host_spare)}")
    where = "device" if spare < 0 else "host"
    size = _peak(plan[where])["items"].get(plan["largest_item"], 0)
    text = f"most goes to {plan['largest_item']}: {numbers.memory(size)}"
    return Verdict(False, f"does not fit: {', '.join(missing)}", text)


def beyond_margin(plan: Mapping[str, Any]) -> str:
    """The end of a sentence of what is to spare; nothing where no margin is kept."""
    margin = plan["margin_bytes"]
    return f", beyond {numbers.memory(margin)} margin" if margin else ""


def scale_of(most_bytes: int, capacity_bytes: int) -> int:
    """What a full bar stands for: the capacity, or the most that there is where that is more.

    Where a capacity would leave nothing to be seen of the bars, it is the most that there is, too.
    """
    is_tiny = most_bytes * TINY < capacity_bytes
    return most_bytes if is_tiny else max(most_bytes, capacity_bytes)


def subject_of(plan: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What was planned: model, method, machine; pairs of name and text."""
    trained, parameters = plan["trained"], plan["parameters"]
    share = "all" if trained == parameters else f"{numbers.billions(trained)} trained"
    layout = f"{numbers.plural(plan['workers'], device_word(plan))}"
    if plan["nodes"] > 1:
        layout += f" on {plan['nodes']:,} nodes"
    return [
        ("parameters", f"{numbers.billions(parameters)}, {share}"),
        *((name, str(value)) for name, value in plan["settings"].items()),
        ("layout", layout),
    ]


def model_name(plan: Mapping[str, Any]) -> str:
    """The last part of the model's path, as a heading."""
    path = str(plan["settings"].get("model") or "A run").partition(" (")[0]
    return path.rstrip("/").rpartition("/")[2].removeprefix("shape:") or path


def hardware_of(plan: Mapping[str, Any]) -> list[tuple[str, str]]:
    """One node, as pairs."""
    return [(name, str(value)) for name, value in plan["hardware"].items()]


# ------------------------------------------------------------------------------------- memory


def item_bars(memory: Mapping[str, Any]) -> list[Bar]:
    """The items of the fullest phase, largest first; a full bar is the largest one."""
    items = sorted(_peak(memory)["items"].items(), key=lambda pair: -pair[1])
    largest = max((size for _, size in items), default=0)
    total = memory["total_bytes"]
    return [
        Bar(name, numbers.memory(size), _ratio(size, largest), numbers.share_of(size, total))
        for name, size in items
    ]


def total_lines(memory: Mapping[str, Any], *, host: bool) -> list[tuple[str, str]]:
    """The three figures apart, and their sum."""
    context = "programs of the processes" if host else "CUDA context and NCCL"
    beyond = [("allocator slack", memory["slack_bytes"]), (context, memory["context_bytes"])]
    found = [
        ("allocated at the peak", memory["allocated_bytes"]),
        *((name, size) for name, size in beyond if size),
        ("in all", memory["total_bytes"]),
    ]
    return [(name, numbers.memory(size)) for name, size in found]


def phase_bars(memory: Mapping[str, Any], capacity_bytes: int) -> list[Bar]:
    """What each phase with anything allocates; a full bar is as `scale_of` says."""
    sizes = {phase["name"]: sum(phase["items"].values()) for phase in memory["phases"]}
    most = scale_of(max(sizes.values()), capacity_bytes)
    return [
        Bar(
            name,
            numbers.memory(size),
            _ratio(size, most),
            "peak" if name == memory["peak_phase"] else "",
        )
        for name, size in sizes.items()
        if size
    ]


def room_lines(memory: Mapping[str, Any], one: str) -> list[str]:
    """Of phases that take more where there is room for it, a sentence each."""
    found = []
    for phase in memory["phases"]:
        name = phase["name"]
        if size := phase.get("if_room"):
            text = f"{name} takes {numbers.memory(size)} more for a moment, only if they are free"
            found.append(text)
        if size := phase.get("on_host"):
            text = f"{name} takes {numbers.memory(size)} of the host for each {one}: it has no room"
            found.append(text)
    return found


def _peak(memory: Mapping[str, Any]) -> Mapping[str, Any]:
    return next(phase for phase in memory["phases"] if phase["name"] == memory["peak_phase"])


# --------------------------------------------------------------------------------------- time


def time_bars(speed: Mapping[str, Any]) -> list[Bar]:
    """The terms of a step, longest first; the one that binds is marked."""
    terms = sorted(speed["terms"].items(), key=lambda pair: -pair[1])
    longest = max((seconds for _, seconds in terms), default=0.0)
    return [
        Bar(
            name,
            seconds_text(seconds),
            _ratio(seconds, longest),
            "binds" if name == speed["binds"] else "",
        )
        for name, seconds in terms
    ]


def traffic_bars(speed: Mapping[str, Any]) -> list[Bar]:
    """What one GPU sends in a step, by purpose, most first."""
    sizes = sorted(speed["traffic_bytes"].items(), key=lambda pair: -pair[1])
    sizes = [(name, size) for name, size in sizes if size]
    most = max((size for _, size in sizes), default=0)
    return [Bar(name, numbers.memory(size), _ratio(size, most)) for name, size in sizes]


def speed_lines(plan: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Time, throughput and cost, as pairs."""
    speed = plan["speed"]
    tokens = speed["tokens"]
    of = f"{numbers.billions(tokens or BILLION)} tokens"
    hours = f"{numbers.hours(speed['hours'])}, {speed['gpu_hours']:,.4g} {device_word(plan)}-hours"
    every = numbers.duration(speed["checkpoint_every_s"])
    write = seconds_text(speed["checkpoint_s"])
    return [
        ("step", f"{seconds_text(speed['step_s'])}, {speed['tokens_per_step']:,} tokens"),
        (
            "throughput",
            f"{numbers.count(speed['tokens_per_s'])} tokens/s"
            f" ({numbers.count(speed['tokens_per_s'] / plan['workers'])}"
            f" of each {device_word(plan)})" + mfu_text(plan),
        ),
        (of if tokens else f"per {of}", hours),
        *_reference_lines(speed),
        ("checkpoints", f"best every {every}; one takes {write}"),
        ("effective time", f"{numbers.share(speed['effective_share'])}, failures counted"),
    ]


def _reference_lines(speed: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The pass of the reference before step 1, if there is one."""
    if not speed.get("reference_s"):
        return []
    tokens = speed["reference_tokens"]
    of = f"for {numbers.billions(tokens or BILLION)} tokens"
    text = f"{seconds_text(speed['reference_s'])} {of if tokens else f'{of} of data'}"
    return [("reference, before step 1", text)]


def mfu_text(plan: Mapping[str, Any]) -> str:
    """The end of a line; nothing on a CPU, for which no peak is stated."""
    return f", MFU {numbers.share(plan['speed']['model_flops_share'])}" if plan["on_gpu"] else ""


def storage_lines(plan: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Disk, and what one GPU sends over the network in a step."""
    found = [
        ("checkpoint on disk", numbers.memory(plan["checkpoint_bytes"])),
        ("export on disk", numbers.memory(plan["export_bytes"])),
    ]
    if plan.get("reference_bytes"):
        found.append(("reference on disk", numbers.memory(plan["reference_bytes"])))
    traffic = {name: size for name, size in plan["speed"]["traffic_bytes"].items() if size}
    if traffic:
        parts = [f"{name} {numbers.memory(size)}" for name, size in traffic.items()]
        total = numbers.memory(sum(traffic.values()))
        of = parts[0].rsplit(" ", 2)[0] if len(parts) == 1 else "; ".join(parts)
        found.append(("sent in a step", f"{total} by each {device_word(plan)}: {of}"))
    return found


def seconds_text(seconds: float) -> str:
    """Three digits, in milliseconds below one second."""
    if seconds >= 60:
        return numbers.duration(seconds)
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1000 * seconds:.3g} ms"


def _ratio(part: float, of: float) -> float:
    return part / of if of else 0.0


# ------------------------------------------------------------------------------------ command


def command_title(plan: Mapping[str, Any]) -> str:
    """What the command is, or lacks: a shape has no weights to train."""
    if not plan["fits"]:
        return "the command, which does not fit"
    shape = str(plan["settings"].get("model", "")).startswith("shape:")
    return "to train it" + ", with the folder of a model as model.path" * shape


def command_of(plan: Mapping[str, Any], typed: Sequence[str]) -> list[str]:
    """The overrides that were typed, and those of the plan after them, which replace some."""
    keys = {word.partition("=")[0] for word in plan["overrides"]}
    return [each for each in typed if each.partition("=")[0] not in keys] + list(plan["overrides"])
