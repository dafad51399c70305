"""plan.html: what a run takes of memory, time, disk and network, before it is started.

JSON of a plan -> figures, stacks (plain values) -> assets/report/plan.html.j2, plan.css
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from posttrain_dist.files import write_atomic
from posttrain_dist.report import numbers
from posttrain_dist.report.page import Card, asset, render
from posttrain_dist.report.plan.fallback_rows import FALLBACK_HEADS, fallback_rows
from posttrain_dist.report.plan.plan_figures import (
    beyond_margin,
    command_of,
    command_title,
    device_word,
    hardware_of,
    mfu_text,
    model_name,
    room_lines,
    seconds_text,
    speed_lines,
    storage_lines,
    subject_of,
    time_bars,
    total_lines,
    traffic_bars,
    verdict_of,
)
from posttrain_dist.report.plan.stacks import memory_chart


def write_plan_page(
    path: Path,
    plan: Mapping[str, Any],
    choice: Mapping[str, Any] | None = None,
    typed: Sequence[str] | None = None,
    verb: str = "train",
) -> Path:
    """Write a plan, from its JSON, as one self-contained page, and return its path.

    Args:
        choice: JSON of the fallbacks that were tried, for their table.
        typed: overrides that were typed, for the command that trains it; None: no command.
        verb: of that command: train or submit.
    """
    write_atomic(path, plan_page(plan, choice, typed, verb))
    return path


def plan_page(
    plan: Mapping[str, Any],
    choice: Mapping[str, Any] | None = None,
    typed: Sequence[str] | None = None,
    verb: str = "train",
) -> str:
    """The page as text; see `write_plan_page`."""
    from markupsafe import Markup

    verdict = verdict_of(plan)
    device, host = plan["device"], plan["host"]
    one = device_word(plan)
    command = "" if typed is None else shlex.join(["posttrain", verb, *command_of(plan, typed)])
    fallbacks = fallback_rows(choice) if choice else []
    return render(
        "plan.html.j2",
        css=Markup(asset("report.css") + asset("plan.css")),
        name=model_name(plan),
        verdict=verdict,
        device=one,
        facts=subject_of(plan),
        warnings=plan["warnings"],
        cards=_cards(plan),
        memories=[
            (
                f"Memory of each {one}",
                memory_chart(
                    device, plan["capacity_bytes"], plan["margin_bytes"], "CUDA context and NCCL"
                ),
                total_lines(device, host=False),
                room_lines(device, one),
            ),
            *(
                [
                    (
                        "Memory of the fullest host",
                        memory_chart(
                            host, plan["host_capacity_bytes"], 0, "programs of the processes"
                        ),
                        total_lines(host, host=True),
                        [],
                    )
                ]
                if host["phases"]
                else []
            ),
        ],
        time=time_bars(plan["speed"]),
        step=seconds_text(plan["speed"]["step_s"]),
        speed=speed_lines(plan),
        traffic=traffic_bars(plan["speed"]),
        storage=storage_lines(plan)[:2],
        hardware=hardware_of(plan),
        fallback_heads=FALLBACK_HEADS,
        fallbacks=fallbacks if len(fallbacks) > 1 else [],
        command=command,
        command_title=command_title(plan),
    )


def _cards(plan: Mapping[str, Any]) -> list[Card]:
    """The four figures that decide whether a run is started."""
    speed, one = plan["speed"], device_word(plan)
    spare, host_spare = plan["spare_bytes"], plan["host_spare_bytes"]
    of = f"of {numbers.memory(plan['capacity_bytes'])}"
    host_total = numbers.memory(plan["host"]["total_bytes"])
    tokens = f"for {numbers.billions(speed['tokens'] or 1e9)} tokens"
    return [
        Card(
            label=f"Memory of each {one}",
            value=numbers.memory(plan["device"]["total_bytes"]),
            unit=of,
            sub=_spare(spare, beyond_margin(plan).removeprefix(", ")),
            tone="good" if spare >= 0 else "bad",
            wide=True,
        ),
        Card(
            label="Memory of the fullest host",
            value=host_total,
            unit=f"of {numbers.memory(plan['host_capacity_bytes'])}",
            sub=_spare(host_spare, ""),
            tone="good" if host_spare >= 0 else "bad",
            wide=True,
        ),
        Card(
            label="Throughput",
            value=numbers.count(speed["tokens_per_s"]),
            unit="tokens/s",
            sub=f"{speed['binds']} binds{mfu_text(plan)}",
        ),
        Card(
            label="Time",
            value=numbers.hours(speed["hours"]),
            sub=f"{tokens}: {speed['gpu_hours']:,.4g} {one}-hours",
        ),
    ]


def _spare(num_bytes: int, beyond: str) -> str:
    if num_bytes >= 0:
        return f"{numbers.memory(num_bytes)} to spare {beyond}".strip()
    return f"{numbers.memory(-num_bytes)} are missing"
