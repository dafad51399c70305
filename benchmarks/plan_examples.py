"""The planned figures of docs/planning.md: the experiments of a 70B, and every fallback of it.

    python benchmarks/plan_examples.py        # seconds; then: python benchmarks/tables.py

Plans what `posttrain plan +experiment=NAME` and `posttrain plan --all` plan. Nothing is measured:
the rows go to benchmarks/results/plan_examples.jsonl so that the page says when they were planned.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import rows
from posttrain_launch.compose.composer import Composer
from posttrain_launch.compose.problems import compose_checked

from posttrain_dist.config import RunConfig, complete
from posttrain_dist.planner.fallbacks import try_all
from posttrain_dist.planner.machine import find_machine
from posttrain_dist.planner.plan import Plan, Tried

NAME = "plan_examples"
EXPERIMENTS = {
    "full": "llama3_70b_full",
    "LoRA": "llama3_70b_lora",
    "QLoRA": "llama3_70b_qlora",
}
FALLBACKS = [
    "model.path=shape:llama3-70b",
    "hardware=h100x8",
    "cluster=slurm",
    "cluster.nodes=4",
    "tuning=auto",
    "engine=auto",
    "data.max_length=8192",
    "train.batch_size=64",
]


def planned(overrides: list[str]) -> tuple[RunConfig, tuple[Tried, ...]]:
    """Every fallback of a command line; one where tuning and engine are named."""
    with Composer() as composer:
        config = complete(compose_checked(composer, overrides).config)
    return config, try_all(config, find_machine(config, plans_only=True))


def figures(plan: Plan) -> dict[str, Any]:
    """What the tables show of a plan."""
    device, speed = plan.device, plan.speed
    return {
        "settings": plan.settings,
        "gpus": plan.workers,
        "trained": plan.trained,
        "peak_phase": str(device.peak.name),
        "allocated_bytes": device.peak.allocated_bytes,
        "slack_bytes": device.slack_bytes,
        "context_bytes": device.context_bytes,
        "spare_bytes": plan.spare_bytes,
        "host_bytes": plan.host.total_bytes,
        "checkpoint_bytes": plan.checkpoint_bytes,
        "sent_bytes": sum(speed.traffic_bytes.values()),
        "step_s": speed.step_s,
        "binds": speed.binds,
        "tokens_per_s": speed.tokens_per_s,
        "mfu": speed.model_flops_share,
        "gpu_hours": speed.gpu_hours,
        "checkpoint_every_s": speed.checkpoint_every_s,
        "fits": plan.fits,
        "item": str(plan.largest_item),
    }


def example_rows() -> Iterator[dict[str, Any]]:
    """One row an experiment, then one an item of their peaks."""
    items: dict[str, dict[str, int]] = {}
    for arm, experiment in EXPERIMENTS.items():
        _, (tried,) = planned([f"+experiment={experiment}"])
        assert tried.plan is not None, tried.refused
        yield {"section": "experiment", "arm": arm, **figures(tried.plan)}
        for item, size in tried.plan.device.peak.items.items():
            items.setdefault(str(item), {})[arm] = size
    for item, sizes in sorted(items.items(), key=lambda pair: -max(pair[1].values())):
        yield {"section": "item", "arm": item, **sizes}


def fallback_rows() -> Iterator[dict[str, Any]]:
    """One row a fallback of the flagship's model, rows and batch on its nodes."""
    for tried in planned(FALLBACKS)[1]:
        row = {"section": "fallback", "arm": tried.name}
        yield row | ({"skipped": tried.refused} if tried.plan is None else figures(tried.plan))


def main() -> None:
    """Plan, and leave the rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=rows.RESULTS)
    folder = parser.parse_args().results
    facts = rows.facts(("posttrain-dist",))
    found = [{**facts, **row} for row in (*example_rows(), *fallback_rows())]
    rows.append(NAME, found, folder)
    for row in found:
        print(row["section"], row["arm"], {k: v for k, v in row.items() if k not in facts})


if __name__ == "__main__":
    main()
