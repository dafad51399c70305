"""The tables of docs/performance.md, tuning.md and planning.md, from benchmarks/results/.

    python benchmarks/tables.py            # rewrites the pages; a test compares them

A table stands between two comments, `<!-- table: name -->` and `<!-- /table -->`, and shows rows of
one run: the last one that has what the table asks for, because only arms of one run compare. Under
it stand machine, versions, load, date and command. What tables there are: `TABLES`, below.
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cells import Cell, Row
from columns import (
    DEEPSPEED,
    FLOOR,
    GPU_HEAD,
    GPU_KERNELS,
    GPU_STEPS,
    HEAD,
    LAST_LAYER,
    LAUNCH,
    PLAN_SPEED,
    PLAN_TRUTH,
    PLANNED,
    PLANNED_FALLBACKS,
    PLANNED_ITEMS,
    PREPARE,
    PROFILE,
    QLORA,
    SHARED_PROMPT,
    STEP,
    TOGETHER,
    TUNINGS,
)

RESULTS = Path(__file__).resolve().parent / "results"
PAGES = [
    RESULTS.parents[1] / "docs" / name for name in ("performance.md", "tuning.md", "planning.md")
]
MARKS = re.compile(r"(<!-- table: ([\w-]+) -->\n).*?(<!-- /table -->)", re.DOTALL)


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """What stands between two marks: some rows of a results file, one line each."""

    source: str  # results/<source>.jsonl
    columns: Mapping[str, Cell]  # heading -> the text of a row
    where: Mapping[str, Any] = field(default_factory=dict)  # what a row must say
    per: Sequence[str] = ()  # rows that differ in these compare only among themselves

    def rows(self, results: Path) -> list[Row]:
        """The rows of the last run that has any; of each group of `per`, if given."""
        path = results / f"{self.source}.jsonl"
        read = [json.loads(line) for line in path.open(encoding="utf-8")] if path.is_file() else []
        found = [row for row in read if self.where.items() <= row.items()]
        last = {self._group(row): run_of(row) for row in found}
        kept = [row for row in found if run_of(row) == last[self._group(row)]]
        return sorted(kept, key=lambda row: list(last).index(self._group(row)))

    def _group(self, row: Row) -> tuple[Any, ...]:
        return tuple(row.get(key) for key in self.per)

    def text(self, results: Path) -> str:
        """The table in Markdown, what was left out and why, and where it was measured."""
        rows = self.rows(results)
        if not rows:
            return "Not measured yet.\n"
        cells = [[c(r) for c in self.columns.values()] for r in rows if reason(r) is None]
        lines = table_lines(list(self.columns), cells)
        left_out = dict.fromkeys(f"{r['arm']}: {reason(r)}" for r in rows if reason(r) is not None)
        if left_out:
            lines += ["", f"Not run: {'; '.join(left_out)}."]
        for last in {run_of(row): row for row in rows}.values():
            lines += ["", origin(last)]
        return "\n".join(lines) + "\n"


class Differences(Table):
    """A table of rows that have an `error`, and below it what their errors are in all."""

    def text(self, results: Path) -> str:
        """The table in Markdown, its rows' median, 95th percentile, lowest and highest error."""
        errors = sorted(row["error"] for row in self.rows(results) if reason(row) is None)
        if not errors:
            return Table.text(self, results)
        sizes = sorted(map(abs, errors))
        high = sizes[min(len(sizes) - 1, round(0.95 * len(sizes)))]
        found = (
            f"{len(errors)} runs: median difference {statistics.median(sizes):.2%}, "
            f"95th percentile {high:.2%}, from {errors[0]:+.2%} to {errors[-1]:+.2%}."
        )
        return f"{Table.text(self, results)}\n{found.replace('%', ' %')}\n"


@dataclass(frozen=True, slots=True)
class Goal:
    """A figure that was aimed at, and the row that holds what was reached."""

    text: str
    sense: str  # "at least" or "at most"
    limit: float
    source: str
    value: str | Callable[[Row], float | None]  # a field, or what is made of several
    where: Mapping[str, Any]
    digits: int = 2

    def cells(self, results: Path) -> list[str]:
        """What was aimed at, what was measured, whether that is enough."""
        limit = f"{self.limit:,g}" if self.limit >= 1 else f"{self.limit:.3g}"
        rows = Table(source=self.source, columns={}, where=self.where).rows(results)
        value = self.reached(rows[-1]) if rows else None
        measured, met = "not measured", ""
        if value is not None:
            reached = value <= self.limit if self.sense == "at most" else value >= self.limit
            measured, met = f"{value:,.{self.digits}f}", "yes" if reached else "**no**"
        return [self.text, f"{self.sense} {limit}", measured, met]

    def reached(self, row: Row) -> float | None:
        """The figure of a row; None where it has none."""
        return row.get(self.value) if isinstance(self.value, str) else self.value(row)


@dataclass(frozen=True, slots=True)
class Goals:
    """A table of goals."""

    goals: Sequence[Goal]

    def text(self, results: Path) -> str:
        """The table in Markdown."""
        cells = [goal.cells(results) for goal in self.goals]
        return "\n".join(table_lines(["", "goal", "measured", "met"], cells)) + "\n"


# ---------------------------------------------------------------------------- making


def run_of(row: Row) -> str:
    """Rows of one process share this."""
    return str(row.get("run", row["date"]))


def reason(row: Row) -> str | None:
    """Why an arm has no figures, or None."""
    found = row.get("skipped", row.get("failed"))
    return None if found is None else str(found)


def table_lines(headings: Sequence[str], cells: Iterable[Sequence[str]]) -> list[str]:
    """Markdown lines; all columns but the first are aligned right."""
    rule = ["---", *("---:" for _ in headings[1:])]
    return [f"| {' | '.join(line)} |" for line in (headings, rule, *cells)]


def origin(row: Row) -> str:
    """Machine, versions, date and command of a row."""
    versions = ", ".join(f"{n} {v}" for n, v in row["versions"].items() if v != "-")
    load = f"; load {row['load_1min']}" if "load_1min" in row else ""
    return f"{row['machine']}; {versions}{load}; {row['date'][:16]}Z; `{row['command']}`"


def fill(page: str, tables: Mapping[str, Table | Goals], results: Path = RESULTS) -> str:
    """The page with every marked table made again.

    Raises:
        KeyError: a mark names no table.
    """

    def make(match: re.Match[str]) -> str:
        return f"{match[1]}\n{tables[match[2]].text(results)}\n{match[3]}"

    return MARKS.sub(make, page)


# ------------------------------------------------------------------------------- goals

FASTER = "ours_times_faster"


def head_rows(num_rows: int, **where: Any) -> dict[str, Any]:
    """Rows of the head's benchmark at one shape on two cores."""
    shape = {"rows": num_rows, "vocabulary": 32_000, "device": "cpu"}
    return {**shape, "head": "trainable", "dtype": "float32", **where}


def gpu_rows(section: str, **where: Any) -> dict[str, Any]:
    """Rows of one section of the GPU's benchmark."""
    return {"section": section, "smoke": False, **where}


def head_goals() -> Iterator[Goal]:
    """Of the head on two cores."""
    times_of = {("TRL", 0.0): 12, ("TRL", 0.75): 30, ("eager", 0.0): 4.5, ("eager", 0.75): 9}
    for (arm, masked), times in times_of.items():
        for n in (1024, 4096):
            what = f"head, N={n}, {masked:.0%} masked: times faster than {arm}"
            where = head_rows(n, arm=arm, masked=masked)
            yield Goal(what, "at least", times, "head", FASTER, where)
    for n, masked in ((1024, 0.0), (4096, 0.0), (4096, 0.75)):
        what = f"head, N={n}, {masked:.0%} masked: share of the GEMM floor"
        where = head_rows(n, arm="ours", masked=masked)
        yield Goal(what, "at least", 0.6, "head", "share_of_floor", where)
    for n in (1024, 4096):
        what, key = f"head, N={n}: extra memory, ours over eager's", "share_of_eager_memory"
        yield Goal(what, "at most", 1 / 12, "head", key, head_rows(n, arm="ours", masked=0.0), 3)
    what, where = "cost at 75 % masked over cost unmasked", head_rows(4096, arm="ours", masked=0.75)
    yield Goal(f"head, N=4096: {what}", "at most", 0.32, "head", "cost_of_first_mask", where)


def step_goals() -> Iterator[Goal]:
    """Ratios of whole steps to TRL as it is, in float32, and tuned; and to one without channels."""
    for kind, times, times_tuned in (("mixed", 15, 9), ("uniform", 3, 3)):
        for trl, limit, where in (
            ("by default", times, {"part": "as_it_is", "arm": "TRL default"}),
            ("by default but float32", times, {"part": "step", "arm": "TRL default, float32"}),
            ("tuned", times_tuned, {"part": "step", "role": "tuned"}),
        ):
            where = {"kind": kind, **where}
            what = f"step, {kind}: times faster than TRL {trl}"
            yield Goal(what, "at least", limit, "step", FASTER, where)
            if kind == "mixed":
                what = f"step, {kind}: memory, ours over TRL {trl}"
                yield Goal(what, "at most", 0.33, "step", "ours_share_of_memory", where)
    for dtype, limit in (("float32", 0.75), ("bfloat16", 0.60)):
        where = {"part": "floor", "kind": "mixed", "arm": f"ours, {dtype}"}
        what = f"step, mixed, {dtype}: share of the speed of its products alone"
        yield Goal(what, "at least", limit, "step", "share_of_floor", where)
    what = "step, mixed, bfloat16: memory over that in float32"
    where = {"part": "memory", "kind": "mixed", "arm": "ours, bfloat16"}
    yield Goal(what, "at most", 1.0, "step", "share_of_float32_memory", where)
    what = "step, mixed: cost of the metrics of 8 channels, %"
    where = {"part": "channels", "arm": "ours, no channels"}
    yield Goal(what, "at most", 1.0, "step", channel_cost, where)


def process_goals() -> Iterator[Goal]:
    """Of DeepSpeed, of launching, and of preparing data."""
    for size in ("10m", "50m"):
        for stage, times in ((2, 1.15), (3, 1.40)):
            for n, several in ((1, "process"), (2, "processes")):
                what = f"ZeRO-{stage}, {size.upper()} parameters, {n} {several}: times a plain step"
                where = {"size": size, "processes": n, "stage": stage, "tokens": 512, "arm": "ours"}
                yield Goal(what, "at most", times, "deepspeed_overhead", "ratio", where)
    what = "command to first step, cluster=local: seconds over a bare loop"
    yield Goal(what, "at most", 2.0, "launch", "over_s", {"arm": "local"})
    what, where = "preparing data: times faster than datasets.map, batched", {"arm": "batched map"}
    yield Goal(what, "at least", 1.5, "prepare", FASTER, where)
    what = "preparing data: seconds from the command to the first rows"
    yield Goal(what, "at most", 2.0, "prepare", "first_s", {"arm": "ours"})
    what = "an empty Ray Train job: its time over that of stock Ray Train"
    yield Goal(what, "at most", 0.5, "launch", share_of_stock, {"arm": "empty_ours"})


def channel_cost(row: Row) -> float | None:
    """How much slower a step is than this one without channels, in percent."""
    times = row.get(FASTER)
    return None if times is None else 100 * (1 / times - 1)


def share_of_stock(row: Row) -> float | None:
    """The time of an arm over that of the arm it is compared with."""
    over = row.get("over_s")
    return None if over is None else float(row["p50_s"] / (row["p50_s"] - over))


def gpu_goals() -> Iterator[Goal]:
    """At the shapes of an 8B model, and of whole steps."""
    for arm, kind, masked, limit in (
        ("ours", "trainable", 0.0, 1 / 1.18),
        *(("TRL", "trainable", 0.0, 1.4), ("TRL", "frozen", 0.0, 1.55)),
        *(("Liger", "trainable", 0.0, 1.8), ("Liger", "trainable", 0.75, 6)),
        ("CCE exact", "trainable", 0.0, 2),
    ):
        key = "share_of_floor" if arm == "ours" else FASTER
        what = "share of the GEMM floor" if arm == "ours" else f"times faster than {arm}"
        what = f"head, {kind}, {masked:.0%} masked: {what}"
        where = gpu_rows("head", arm=arm, head=kind, masked=masked, rows=16_384)
        yield Goal(what, "at least", limit, "gpu", key, where)
    uniform = {"kind": "uniform", "arm": "ours"}
    for model, what, limit, key, where in (
        ("3B full", ": times faster than TRL by default", 4, FASTER, {"arm": "TRL default, 8 x 4"}),
        ("3B full", ": times faster than TRL at its best", 1.4, FASTER, {"role": "best"}),
        ("3B full", ", unmasked: MFU", 0.52, "mfu", uniform),
        ("8B LoRA", ", unmasked: tokens/s", 16_500, "tokens_per_s", uniform),
    ):
        where = gpu_rows("steps", model=model, **where)
        yield Goal(f"{model}{what}", "at least", limit, "gpu", key, where)


# ------------------------------------------------------------- tables, by the name in their marks


def step(kind: str, part: str = "step") -> Table:
    """All arms on one kind of data."""
    return Table(source="step", columns=STEP, where={"kind": kind, "part": part})


TABLES: dict[str, Table | Goals] = {
    "goals": Goals([*head_goals(), *step_goals(), *process_goals()]),
    "head-1024": Table(source="head", columns=HEAD, where=head_rows(1024)),
    "head-4096": Table(source="head", columns=HEAD, where=head_rows(4096)),
    "head-1024-frozen": Table(source="head", columns=HEAD, where=head_rows(1024, head="frozen")),
    "head-bf16": Table(source="head", columns=HEAD, where=head_rows(128, dtype="bfloat16")),
    "last-layer": Table(source="last_layer", columns=LAST_LAYER),
    "shared-prompt": Table(source="shared_prompt", columns=SHARED_PROMPT),
    "step-mixed": step("mixed"),
    "step-uniform": step("uniform"),
    "step-as-it-is": step("mixed", "as_it_is"),
    "step-uniform-as-it-is": step("uniform", "as_it_is"),
    "step-tuning": step("mixed", "tune"),
    "step-tuning-uniform": step("uniform", "tune"),
    "step-channels": step("mixed", "channels"),
    "step-floor": Table(source="step", columns=FLOOR, where={"part": "floor", "kind": "mixed"}),
    "step-profile": Table(source="step", columns=PROFILE, where={"part": "profile"}),
    "launch": Table(source="launch", columns=LAUNCH),
    "prepare": Table(source="prepare", columns=PREPARE),
    "deepspeed-overhead": Table(
        source="deepspeed_overhead", columns=DEEPSPEED, per=("size", "processes", "stage", "tokens")
    ),
    "tunings": Table(source="tunings", columns=TUNINGS, where={"summary": True}, per=("arm",)),
    "together": Table(source="together", columns=TOGETHER),
    "qlora-70b": Table(source="qlora_70b", columns=QLORA, where={"shape": "70b"}),
    **{
        f"plan-{section}s": Table(
            source="plan_examples", columns=columns, where={"section": section}
        )
        for section, columns in (
            ("experiment", PLANNED),
            ("item", PLANNED_ITEMS),
            ("fallback", PLANNED_FALLBACKS),
        )
    },
    "plan-truth": Differences(source="plan_truth", columns=PLAN_TRUTH, per=("arm",)),
    "plan-speed": Table(source="plan_speed", columns=PLAN_SPEED),
    "gpu-goals": Goals([*gpu_goals()]),
    "gpu-kernels": Table(source="gpu", columns=GPU_KERNELS, where=gpu_rows("kernels")),
    "gpu-head": Table(source="gpu", columns=GPU_HEAD, where=gpu_rows("head")),
    "gpu-steps": Table(source="gpu", columns=GPU_STEPS, where=gpu_rows("steps")),
}


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(fill(page.read_text(encoding="utf-8"), TABLES), encoding="utf-8")
