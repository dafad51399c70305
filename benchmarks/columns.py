"""The columns of every table of tables.py: heading -> the text of a row."""

from __future__ import annotations

from cells import Cell, error, number, span, text, texts

MIB = 2.0**-20

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
LAST_LAYER: dict[str, Cell] = {
    "arm": text("arm"),
    "masked": number("masked", 0, 100, " %"),
    "rows computed": text("computed"),
    "s": number("p50_s"),
    "gain, of the layer": number("layer_gain", 1, 100, " %"),
    "gain, of 32 layers": number("step_gain", 2, 100, " %"),
    "error": error("error"),
}
SHARED_PROMPT: dict[str, Cell] = {
    "case": text("case"),
    "prompt": text("arm"),
    "tokens computed": text("tokens"),
    "s": number("p50_s"),
    "sequence tokens/s": number("tokens_per_s", 0),
    "head, of the work": number("head_share", 0, 100, " %"),
    "token ratio": number("token_ratio"),
    "work ratio": number("work_ratio"),
    "times faster": number("times_faster"),
    "of the work ratio": number("reached", 0, 100, " %"),
    "loss error": error("error"),
}
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
FLOOR = {name: STEP[name] for name in ("arm", "s a step", "p20 to p80", "real tokens/s")}
FLOOR["of the products' speed"] = number("share_of_floor", 0, 100, " %")
PROFILE: dict[str, Cell] = {
    "kind": text("arm"),
    "s a step": number("p50_s", 3),
    "share": number("share", 1, 100, " %"),
}
LAUNCH: dict[str, Cell] = {
    "arm": text("arm"),
    "s": number("p50_s", 1),
    "p20 to p80": span("p20_s", "p80_s", 1),
    "over": text("over"),
    "by s": number("over_s", 1),
}
PREPARE: dict[str, Cell] = {
    **{key: LAUNCH[key] for key in ("arm", "s", "p20 to p80")},
    "rows/s": number("rows_per_s", 0),
    "times ours": number("ours_times_faster"),
    "first rows after s": number("first_s", 1),
    "peak MiB": number("peak_bytes", 0, MIB),
}
DEEPSPEED: dict[str, Cell] = {
    **texts(arm="arm", model="size", processes="processes", ZeRO="stage", tokens="tokens"),
    "ms": number("p50_s", 1, 1e3),
    "times single": number("ratio"),
    "p20 to p80": lambda row: " to ".join(f"{x:.2f}" for x in row.get("ratio_p20_p80", ())),
    "of processor time": number("cpu_ratio"),
    "peak MiB": number("peak_bytes", 0, MIB),
}
GPU_KERNELS: dict[str, Cell] = {
    **texts(arm="arm", N="rows", D="hidden", V="vocabulary", dtype="dtype"),
    "masked": number("masked", 0, 100, " %"),
    "softcap": text("softcap"),
    **{f"{x} error": error(f"{x}_error") for x in ("loss", "hidden", "weight")},
    **{f"eager's {x}": error(f"eager_{x}") for x in ("loss", "hidden", "weight")},
}
GPU_HEAD: dict[str, Cell] = {**texts(arm="arm", N="rows", weight="head"), **HEAD}
GPU_STEPS: dict[str, Cell] = {
    **texts(arm="arm", model="model", samples="kind"),
    "s a step": number("p50_s", 3),
    "p20 to p80": span("p20_s", "p80_s", 3),
    "real tokens/s": number("tokens_per_s", 0),
    "times ours": number("ours_times_faster"),
    "MFU": number("mfu", 1, 100, " %"),
    "peak GiB": number("peak_bytes", 1, 2.0**-30),
    "losses apart": error("loss_apart"),
}

TUNINGS: dict[str, Cell] = {
    "arm": text("arm"),
    "learning rate": text("lr"),
    "trained": number("trainable", 0),
    "saved kB": number("saved_bytes", 0, 1e-3),
    "held-out loss": number("heldout", 3),
    "of its seeds": span("heldout_low", "heldout_high", 3),
    "exact match": number("exact_match", 0, 100, " %"),
    "tokens/s": number("tokens_per_s", 0),
    "peak MiB": number("peak_bytes", 0, MIB),
}
TOGETHER: dict[str, Cell] = {
    **texts(trials="trials", arm="arm"),
    "peak MiB": number("peak_bytes", 0, MIB),
    "base MiB": number("base_bytes", 0, MIB),
    "s": number("seconds", 0),
}
QLORA: dict[str, Cell] = {
    **texts(arm="arm", tokens="tokens"),
    **{n: number(f"{k}_bytes", 1, 2.0**-30) for n, k in (("peak GiB", "peak"), ("goal", "goal"))},
    "tokens/s": number("tokens_per_s", 0),
}

GIB = 2.0**-30
PLANNED: dict[str, Cell] = {
    **texts(experiment="arm", GPUs="gpus"),
    **{
        f"{name} GiB": number(f"{key}_bytes", 1, GIB)
        for name, key in (
            ("allocated", "allocated"),
            ("slack", "slack"),
            ("context", "context"),
            ("spare", "spare"),
            ("a host's", "host"),
            ("checkpoint", "checkpoint"),
            ("sent in a step", "sent"),
        )
    },
    "s a step": number("step_s", 1),
    **texts(binds="binds"),
    "tokens/s": number("tokens_per_s", 0),
    "MFU": number("mfu", 1, 100, " %"),
    "GPU-hours per 1B tokens": number("gpu_hours", 0),
}
PLANNED_ITEMS: dict[str, Cell] = {
    **texts(item="arm"),
    **{name: number(name, 2, GIB) for name in ("full", "LoRA", "QLoRA")},
}
PLANNED_FALLBACKS: dict[str, Cell] = {
    "fallback": text("arm"),
    "fits": lambda row: "yes" if row["fits"] else "**no**",
    "spare GiB": number("spare_bytes", 1, GIB),
    "most goes to": text("item"),
    "recomputed": lambda row: str(row["settings"]["checkpointing"]),
    **{name: PLANNED[name] for name in ("GPUs", "tokens/s", "GPU-hours per 1B tokens")},
}
PLAN_TRUTH: dict[str, Cell] = {
    **texts(run="arm", fullest="phase"),
    "planned MB": number("predicted_bytes", 2, 1e-6),
    "measured MB": number("measured_bytes", 2, 1e-6),
    "difference": lambda row: f"{100 * row['error']:+.2f} %",
}
PLAN_SPEED: dict[str, Cell] = {
    **texts(training="arm"),
    "published by": text("published_by"),
    "published": number("published", 0),
    "planned": number("planned", 0),
    "ratio": number("ratio", 2),
    "fitted": lambda row: "yes" if row["fitted"] else "no",
}
