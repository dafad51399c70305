"""Header, cards and channel table of a report: every number that stands as text."""

from __future__ import annotations

import shlex
import statistics
from pathlib import Path
from typing import Any

from posttrain_dist.report import numbers
from posttrain_dist.report.page import Card
from posttrain_dist.report.run.read import Run, column

LAYOUTS = {0: "ZeRO-0", 1: "ZeRO-1", 2: "ZeRO-2", 3: "ZeRO-3"}


def header_of(run: Run) -> dict[str, Any]:
    """Name, outcome and main choices."""
    step, total = run.last_step, run.total_steps
    progress = f"step {step:,} of {total:,}" if total is not None else f"step {step:,}"
    config = run.config
    model = str(_get(config, "model", "path") or "")
    facts = {
        "model": Path(model).name or None,
        "data": _data(config),
        "objective": _choice(run, "objective"),
        "tuning": _choice(run, "tuning"),
        "seed": _get(config, "seed"),
    }
    created = str(run.lineage.get("created") or "").replace("T", " ")[:16]
    lead = [part for part in (created, str(run.lineage.get("id") or ""), progress) if part]
    return {
        "name": str(config.get("name") or run.lineage.get("name") or run.folder.name),
        "outcome": run.outcome,
        "tone": "good" if run.outcome == "completed" else "warn",
        "lead": " · ".join(lead),
        "facts": [(key, str(value)) for key, value in facts.items() if value is not None],
    }


def loss_of_objective(run: Run) -> str:
    """What the loss of the run is, as the beginning of a sentence."""
    objective = str(_get(run.config, "objective", "kind") or "sft")
    if objective in ("sft", "pretrain"):
        return "Mean negative log-likelihood of a supervised token, in nats"
    return f"What objective={objective} minimises"


def _data(config: dict[str, Any]) -> str | None:
    """What was trained on; where there are sources, `data.train` is not."""
    sources = _get(config, "data", "sources")
    if not isinstance(sources, dict) or not sources:
        return _get(config, "data", "train")  # type: ignore[no-any-return]
    names = ", ".join(map(str, sources))
    return f"{len(sources)} sources: {names}" if len(sources) > 1 else names


def cards_of(run: Run, channels: list[dict[str, Any]]) -> list[Card]:
    """The key figures that the run has numbers for; `channels` is what `channel_rows` gave."""
    return [*_quality_cards(run, channels), *_machine_cards(run)]


def _quality_cards(run: Run, channels: list[dict[str, Any]]) -> list[Card]:
    found = []
    held = column(run.rows, "eval/loss")
    if held.y:
        card = Card(label="Held-out loss", value=numbers.loss(held.y[-1]), sub="", wide=True)
        card.sub = f"at step {held.x[0]:,}"
        if len(held.y) > 1:
            card.before, card.tone = numbers.loss(held.y[0]), numbers.tone(held.y[0], held.y[-1])
            change = numbers.change(held.y[0], held.y[-1])
            card.sub = f"{change} from step {held.x[0]:,} to {held.x[-1]:,}"
        found.append(card)
    found += _accuracy_cards(run)
    before, after = _total_match(run, "before"), _total_match(run, "after")
    if after:
        right, of = after
        sub = f"{right:,} of {of:,} held-out answers right"
        card = Card(label="Exact match", value=numbers.percent(right, of), sub=sub, wide=True)
        card.before = numbers.percent(*before) if before else ""
        found.append(card)
    changed = [row for row in channels if row["ratio"] is not None]
    if len(changed) > 1:
        best = min(changed, key=lambda row: row["ratio"])
        sub = f"{best['name']}: {best['before']} → {best['after']}"
        found.append(Card(label="Best channel", value=best["change"], sub=sub))
    return found


def _accuracy_cards(run: Run) -> list[Card]:
    """How often the better one of two held-out answers has the higher reward."""
    right = column(run.rows, f"eval_{_get(run.config, 'objective', 'kind')}/accuracy")
    if not right.y:
        return []
    sub = "of held-out comparisons ordered rightly"
    card = Card(label="Accuracy", value=numbers.percent(right.y[-1], 1), sub=sub, wide=True)
    if len(right.y) > 1:
        card.before = numbers.percent(right.y[0], 1)
    return [card]


def _machine_cards(run: Run) -> list[Card]:
    found = []
    rates = column(run.rows, "train/tokens_per_s").y
    if rates:
        median = numbers.count(statistics.median(rates))
        found.append(
            Card(label="Throughput", value=median, unit="tokens/s", sub="median, all workers")
        )
    times = column(run.rows, "time_s").y
    if times:
        sub = f"{run.last_step:,} optimizer steps"
        found.append(Card(label="Wall time", value=numbers.duration(max(times)), sub=sub))
    memory = column(run.rows, "system/memory_bytes").y
    if memory:
        power = numbers.memory_power(max(memory))
        peak, unit = f"{max(memory) / 1024**power:.3g}", numbers.MEMORY_UNITS[power]
        found.append(Card(label="Peak memory", value=peak, unit=unit, sub="of the largest worker"))
    workers, layout = _layout(run)
    if workers:
        unit = "worker" if workers == 1 else "workers"
        found.append(Card(label="Layout", value=f"{workers:,}", unit=unit, sub=layout))
    return found


def _layout(run: Run) -> tuple[int | None, str]:
    """Number of worker processes, and what shards the state over them."""
    workers = len(list((run.folder / "logs").glob("rank-*.log")))
    workers = workers or _get(run.config, "cluster", "workers")
    if not workers and _get(run.config, "cluster", "kind") == "local":
        workers = 1
    stage = _get(run.config, "engine", "stage")
    engine = LAYOUTS.get(stage) if isinstance(stage, int) else None
    offload = " with CPU offload" if _get(run.config, "engine", "offload") else ""
    parts = [f"{engine}{offload}" if engine else _choice(run, "engine"), _choice(run, "cluster")]
    return (workers if isinstance(workers, int) else None), " · ".join(p for p in parts if p)


def _choice(run: Run, group: str) -> str | None:
    chosen = _get(run.config, "choices", group) or _get(run.config, group, "kind")
    return None if chosen is None else str(chosen)


def _get(values: Any, *keys: str) -> Any:
    for key in keys:
        values = values.get(key) if isinstance(values, dict) else None
    return values


def command_of(run: Run) -> str:
    """The command that started the run, as it could be typed again."""
    command = run.lineage.get("command") or ""
    return shlex.join(map(str, command)) if isinstance(command, list) else str(command)


def channel_rows(run: Run) -> list[dict[str, Any]]:
    """One row a channel, in the order of their first appearance; what is unknown is None."""
    rows = []
    shares = {name: run.share(name) for name in run.channels}
    most = max((share or 0.0 for share in shares.values()), default=0.0)
    for name, share in shares.items():
        held = column(run.rows, f"eval_channel_loss/{name}").y
        both = len(held) > 1
        matches = {when: run.matches[when].get(name) for when in ("before", "after")}
        rows.append(
            {
                "name": name,
                "share": None if share is None else numbers.share(share),
                "share_width": numbers.bar_width(share or 0.0, most),
                "before": numbers.loss(held[0]) if held else None,
                "after": numbers.loss(held[-1]) if both else None,
                "change": numbers.change(held[0], held[-1]) if both else None,
                "ratio": held[-1] / held[0] if both and held[0] > 0 else None,
                "tone": numbers.tone(held[0], held[-1]) if both else "",
                "match_before": _match(matches["before"]),
                "match_after": _match(matches["after"]),
            }
        )
    return rows


def sample_of(sample: dict[str, Any]) -> dict[str, str]:
    """The texts of one sample answer."""
    keys = ("channel", "prompt", "reference", "before", "after")
    return {key: str(sample.get(key) or "").strip() for key in keys}


def _match(count: dict[str, int] | None) -> str | None:
    return f"{count['right']:,} / {count['of']:,}" if count else None


def _total_match(run: Run, when: str) -> tuple[int, int] | None:
    counts = run.matches[when].values()
    of = sum(count["of"] for count in counts)
    return (sum(count["right"] for count in counts), of) if of else None
