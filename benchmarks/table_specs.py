"""What the tables of docs/performance.md show, by the name in their marks."""

from __future__ import annotations

from typing import Any

from tables import Cell, Goal, Goals, Row, Table, error, number, span, text

MIB = 2.0**-20

# ------------------------------------------------------------------------------ head

HEAD: dict[str, Cell] = {
    "arm": text("arm"),
    "masked": number("masked", 0, 100, " %"),
    "ms": number("p50_s", 0, 1e3),
    "p20 to p80": span("p20_s", "p80_s", 0, 1e3),
    "times ours": number("ours_times_faster"),
    "share of the floor": number("share_of_floor"),
    "extra MiB": number("peak_extra_bytes", 0, MIB),
    "error": error("loss_error", "gradient_error"),
}


def head(num_rows: int, kind: str = "trainable", dtype: str = "float32") -> Table:
    """All arms and masks of one shape on two cores."""
    return Table(source="head", columns=HEAD, where=_head(num_rows, kind, dtype))


def _head(num_rows: int, kind: str = "trainable", dtype: str = "float32") -> dict[str, Any]:
    return {"rows": num_rows, "head": kind, "dtype": dtype, "device": "cpu", "vocabulary": 32_000}


def _of(arm: str, num_rows: int, masked: float) -> dict[str, Any]:
    return {**_head(num_rows), "arm": arm, "masked": masked}


def _field(key: str) -> Any:
    return lambda row: row.get(key)


def head_goal(arm: str, num_rows: int, masked: float, times: float) -> Goal:
    """Ours is `times` faster than an arm."""
    return Goal(
        said=f"head, N={num_rows}, {masked:.0%} masked: times faster than {arm}",
        limit=times,
        most=False,
        source="head",
        where=_of(arm, num_rows, masked),
        value=_field("ours_times_faster"),
    )


def floor_goal(num_rows: int, masked: float) -> Goal:
    """Ours reaches a share of its own matrix products."""
    return Goal(
        said=f"head, N={num_rows}, {masked:.0%} masked: share of the GEMM floor",
        limit=0.6,
        most=False,
        source="head",
        where=_of("ours", num_rows, masked),
        value=_field("share_of_floor"),
    )


def memory_goal(num_rows: int) -> Goal:
    """Extra memory of ours against eager's."""
    return Goal(
        said=f"head, N={num_rows}: extra memory, ours over eager's",
        limit=1 / 12,
        most=True,
        source="head",
        where=_of("ours", num_rows, 0.0),
        value=_field("share_of_eager_memory"),
        digits=3,
    )


# ------------------------------------------------------------------------------ step

STEP: dict[str, Cell] = {
    "arm": text("arm"),
    "s a step": number("p50_s"),
    "p20 to p80": span("p20_s", "p80_s"),
    "real tokens/s": number("tokens_per_s", 0),
    "times ours": number("ours_times_faster"),
    "its p20 to p80": span("ratio_p20", "ratio_p80"),
    "times our CPU time": number("ours_times_less_cpu"),
    "peak MiB": number("peak_bytes", 0, MIB),
    "loss error": error("loss_error"),
    "gradient norm error": error("norm_error"),
}


def step(kind: str, part: str = "step") -> Table:
    """All arms on one kind of data."""
    return Table(source="step", columns=STEP, where={"kind": kind, "part": part})


def step_goals(kind: str, times: float, times_tuned: float) -> list[Goal]:
    """Ratios of whole steps to TRL as it is, in float32, and tuned."""
    fields = {
        "by default": {"part": "as_it_is", "arm": "TRL default"},
        "by default but float32": {"part": "step", "arm": "TRL default, float32"},
        "tuned": {"part": "step", "role": "tuned"},
    }
    goals = []
    for said, where in fields.items():
        for key, what, limit in (
            ("ours_times_faster", "times faster than TRL", times_tuned if "tu" in said else times),
            ("ours_share_of_memory", "memory, ours over TRL", 0.33),
        ):
            goal = Goal(
                said=f"step, {kind}: {what} {said}",
                limit=limit,
                most=key == "ours_share_of_memory",
                source="step",
                where={"kind": kind, **where},
                value=_field(key),
            )
            goals.append(goal)
    return goals


def deepspeed_goal(size: str, processes: int, stage: int, times: float) -> Goal:
    """A step under DeepSpeed takes at most `times` one of the `single` engine."""
    where = {"size": size, "processes": processes, "stage": stage, "tokens": 512, "arm": "ours"}
    several = "process" if processes == 1 else "processes"
    return Goal(
        said=f"ZeRO-{stage}, {size.upper()} parameters, {processes} {several}: times a plain step",
        limit=times,
        most=True,
        source="deepspeed_overhead",
        where=where,
        value=_field("ratio"),
    )


def _share_of_stock(row: Row) -> float | None:
    over = row.get("over_s")
    return None if over is None else float(row["p50_s"] / (row["p50_s"] - over))


def _channel_cost(row: Row) -> float | None:
    times = row.get("ours_times_faster")  # how much slower it is without channels
    return None if times is None else 100 * (1 / times - 1)


GOALS = Goals(
    [
        head_goal("TRL", 1024, 0.0, 12),
        head_goal("TRL", 4096, 0.0, 12),
        head_goal("TRL", 1024, 0.75, 30),
        head_goal("TRL", 4096, 0.75, 30),
        head_goal("eager", 1024, 0.0, 4.5),
        head_goal("eager", 4096, 0.0, 4.5),
        head_goal("eager", 1024, 0.75, 9),
        head_goal("eager", 4096, 0.75, 9),
        floor_goal(1024, 0.0),
        floor_goal(4096, 0.0),
        floor_goal(4096, 0.75),
        memory_goal(1024),
        memory_goal(4096),
        Goal(
            said="head, N=4096: cost at 75 % masked over cost unmasked",
            limit=0.32,
            most=True,
            source="head",
            where=_of("ours", 4096, 0.75),
            value=_field("cost_of_first_mask"),
        ),
        *step_goals("mixed", 15, 9),
        *(g for g in step_goals("uniform", 3, 3) if not g.most),
        Goal(
            said="step, mixed: cost of the metrics of 8 channels, %",
            limit=1.0,
            most=True,
            source="step",
            where={"part": "channels", "arm": "ours, no channels"},
            value=_channel_cost,
        ),
        *(
            deepspeed_goal(size, processes, stage, times)
            for size in ("10m", "50m")
            for stage, times in ((2, 1.15), (3, 1.40))
            for processes in (1, 2)
        ),
        Goal(
            said="command to first step, cluster=local: seconds over a bare loop",
            limit=2.0,
            most=True,
            source="launch",
            where={"arm": "local"},
            value=_field("over_s"),
        ),
        Goal(
            said="an empty Ray Train job: its time over that of stock Ray Train",
            limit=0.5,
            most=True,
            source="launch",
            where={"arm": "empty_ours"},
            value=_share_of_stock,
        ),
    ]
)

PROFILE: dict[str, Cell] = {
    "kind": text("arm"),
    "s a step": number("p50_s", 3),
    "share": number("share", 1, 100, " %"),
}

# ------------------------------------------------------------------------- the others

LAUNCH: dict[str, Cell] = {
    "arm": text("arm"),
    "s": number("p50_s", 1),
    "p20 to p80": span("p20_s", "p80_s", 1),
    "over": text("over"),
    "by s": number("over_s", 1),
}

DEEPSPEED: dict[str, Cell] = {
    "arm": text("arm"),
    "model": text("size"),
    "processes": text("processes"),
    "ZeRO": text("stage"),
    "tokens": text("tokens"),
    "ms": number("p50_s", 1, 1e3),
    "times single": number("ratio"),
    "p20 to p80": lambda row: " to ".join(f"{x:.2f}" for x in row.get("ratio_p20_p80", ())),
    "of processor time": number("cpu_ratio"),
    "peak MiB": number("peak_bytes", 0, MIB),
}

# -------------------------------------------------------------------------------- GPU

GPU_KERNELS: dict[str, Cell] = {
    "arm": text("arm"),
    "N": text("rows"),
    "D": text("hidden"),
    "V": text("vocabulary"),
    "dtype": text("dtype"),
    "masked": number("masked", 0, 100, " %"),
    "softcap": text("softcap"),
    **{f"{x} error": error(f"{x}_error") for x in ("loss", "hidden", "weight")},
    **{f"eager's {x}": error(f"eager_{x}") for x in ("loss", "hidden", "weight")},
}
GPU_HEAD: dict[str, Cell] = {
    "arm": text("arm"),
    "N": text("rows"),
    "weight": text("head"),
    **{key: cell for key, cell in HEAD.items() if key != "arm"},
}
GPU_STEPS: dict[str, Cell] = {
    "arm": text("arm"),
    "model": text("model"),
    "samples": text("kind"),
    "s a step": number("p50_s", 3),
    "p20 to p80": span("p20_s", "p80_s", 3),
    "real tokens/s": number("tokens_per_s", 0),
    "times ours": number("ours_times_faster"),
    "MFU": number("mfu", 1, 100, " %"),
    "peak GiB": number("peak_bytes", 1, 2.0**-30),
    "losses apart": error("loss_apart"),
}


def _gpu(section: str, **where: Any) -> dict[str, Any]:
    return {"section": section, "smoke": False, **where}


def gpu_head_goal(arm: str, kind: str, masked: float, times: float) -> Goal:
    """Ours is `times` faster than an arm at the shapes of an 8B model."""
    return Goal(
        said=f"head, {kind}, {masked:.0%} masked: times faster than {arm}",
        limit=times,
        most=False,
        source="gpu",
        where=_gpu("head", arm=arm, head=kind, masked=masked, rows=16_384),
        value=_field("ours_times_faster"),
    )


def gpu_step_goal(said: str, limit: float, key: str, **where: str) -> Goal:
    """A figure of a whole step is at least `limit`."""
    found = _gpu("steps", **where)
    return Goal(said=said, limit=limit, most=False, source="gpu", where=found, value=_field(key))


GPU_GOALS = Goals(
    [
        Goal(
            said="head, trainable, 0% masked: share of the GEMM floor",
            limit=1 / 1.18,
            most=False,
            source="gpu",
            where=_gpu("head", arm="ours", head="trainable", masked=0.0, rows=16_384),
            value=_field("share_of_floor"),
        ),
        gpu_head_goal("TRL", "trainable", 0.0, 1.4),
        gpu_head_goal("TRL", "frozen", 0.0, 1.55),
        gpu_head_goal("Liger", "trainable", 0.0, 1.8),
        gpu_head_goal("Liger", "trainable", 0.75, 6),
        gpu_head_goal("CCE exact", "trainable", 0.0, 2),
        gpu_step_goal(
            "3B full: times faster than TRL by default",
            4,
            "ours_times_faster",
            model="3B full",
            arm="TRL default, 8 x 4",
        ),
        gpu_step_goal(
            "3B full: times faster than TRL at its best",
            1.4,
            "ours_times_faster",
            model="3B full",
            role="best",
        ),
        gpu_step_goal(
            "3B full, unmasked: MFU", 0.52, "mfu", model="3B full", kind="uniform", arm="ours"
        ),
        gpu_step_goal(
            "8B LoRA, unmasked: tokens/s",
            16_500,
            "tokens_per_s",
            model="8B LoRA",
            kind="uniform",
            arm="ours",
        ),
    ]
)


TABLES: dict[str, Table | Goals] = {
    "goals": GOALS,
    "head-1024": head(1024),
    "head-4096": head(4096),
    "head-1024-frozen": head(1024, "frozen"),
    "head-bf16": head(128, dtype="bfloat16"),
    "step-mixed": step("mixed"),
    "step-uniform": step("uniform"),
    "step-as-it-is": step("mixed", "as_it_is"),
    "step-uniform-as-it-is": step("uniform", "as_it_is"),
    "step-tuning": step("mixed", "tune"),
    "step-tuning-uniform": step("uniform", "tune"),
    "step-channels": step("mixed", "channels"),
    "step-profile": Table(source="step", columns=PROFILE, where={"part": "profile"}),
    "launch": Table(source="launch", columns=LAUNCH),
    "deepspeed-overhead": Table(
        source="deepspeed_overhead", columns=DEEPSPEED, per=("size", "processes", "stage", "tokens")
    ),
    "gpu-goals": GPU_GOALS,
    "gpu-kernels": Table(source="gpu", columns=GPU_KERNELS, where=_gpu("kernels")),
    "gpu-head": Table(source="gpu", columns=GPU_HEAD, where=_gpu("head")),
    "gpu-steps": Table(source="gpu", columns=GPU_STEPS, where=_gpu("steps")),
}
