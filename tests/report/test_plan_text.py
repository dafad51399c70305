"""A plan for the terminal: its figures, its width, what does not fit and why."""

from __future__ import annotations

import dataclasses
import re

import pytest
from made_plans import FITS, FULL_HOST, GIB, PHASES, TIGHT, as_json, choice_json

from posttrain_dist.planner.plan import Memory
from posttrain_dist.report.plan.fallback_rows import fallback_rows, why_not_above
from posttrain_dist.report.plan.plan_text import plan_table, plan_text

WORDS = ["model.path=shape:llama3-70b", "engine=auto", "name=a run"]


def lines_of(text: str) -> list[list[str]]:
    return [re.split(r"\s{2,}", line.strip()) for line in text.splitlines()]


def test_figures_of_a_plan_that_fits():
    text = plan_text(as_json(FITS), WORDS)
    lines = lines_of(text)
    # 80 of capacity, less 4 of margin, 65 allocated, 2 of slack, 1 of context.
    assert text.startswith("✓ fits: 8.00 GiB of each GPU to spare, beyond 4.00 GiB margin\n")
    for pair in (
        ["allocated at the peak", "65.0 GiB"],
        ["allocator slack", "2.00 GiB"],
        ["CUDA context and NCCL", "1.00 GiB"],
        ["in all", "68.0 GiB"],
        ["parameters", "70.6B, all"],
        ["checkpoint on disk", "920 GiB"],
        ["2.0B tokens", "25.4 h, 812.8 GPU-hours"],
        ["layout", "32 GPUs on 4 nodes"],
    ):
        assert pair in lines, pair
    assert "sent in a step      350 GiB by each GPU: parameters 280 GiB; gradients 70.0 GiB" in text
    assert "each host has 1.84 TiB of its memory left" in text  # 2,048 - 160 GiB
    assert "! ZeRO-3 costs more than it saves here" in text
    # The words that the plan replaces are gone, the others are quoted.
    assert text.endswith(
        "  posttrain train model.path=shape:llama3-70b 'name=a run' engine=zero3"
        " train.micro_batch_size=1"
    )
    assert "posttrain train" not in plan_text(as_json(FITS))
    shape = as_json(FITS) | {"settings": {"model": "shape:llama3-70b (llama)"}}
    assert plan_text(shape, WORDS, verb="submit").splitlines()[-2:] == [
        "to train it, with the folder of a model as model.path",
        "  posttrain submit model.path=shape:llama3-70b 'name=a run' engine=zero3"
        " train.micro_batch_size=1",
    ]


def test_bars_are_as_long_as_what_they_stand_for():
    found = {line[0]: line for line in lines_of(plan_text(as_json(FITS), width=88))}
    lengths = {
        name: sum("▏▎▍▌▋▊▉█".index(block) + 1 for block in line[1]) / 8
        for name, line in found.items()
        if len(line) > 2 and line[1][0] in "█▏▎▍▌▋▊▉"
    }
    moments = lengths["optimizer moments"]
    assert lengths["checkpointed inputs of layers"] == pytest.approx(moments * 10 / 16, abs=0.1)
    assert found["optimizer moments"][2:] == ["16.0 GiB", "23.5%"]  # of 68 GiB
    # Of a phase, a full bar is the capacity, not the largest phase.
    assert lengths["backward"] == pytest.approx(moments * 65 / 80, abs=0.1)
    assert lengths["forward and loss"] == pytest.approx(moments * 47 / 80, abs=0.1)
    assert found["backward"][3] == "peak" and len(found["save"]) == 3
    assert found["compute"][2:] == ["21.5 s", "binds"] and found["update"][2:] == ["125 ms"]


def test_what_does_not_fit_names_where_by_how_much_and_the_item():
    title, text = plan_text(as_json(TIGHT)).splitlines()[:2]
    assert title == "✗ does not fit: each GPU lacks 12.0 GiB"  # 60 - 4 - 68
    assert text == "  most goes to optimizer moments: 16.0 GiB"
    title, text = plan_text(as_json(FULL_HOST)).splitlines()[:2]
    assert title == "✗ does not fit: each host lacks 60.0 GiB"  # 100 - 160
    assert text == "  most goes to copies for loading: 140 GiB"


def test_a_run_on_cpus_has_ranks_and_neither_slack_nor_margin():
    plan = dataclasses.replace(
        FITS,
        on_gpu=False,
        device=Memory(PHASES),
        capacity_bytes=65 * 51 * GIB,
        margin_bytes=0,
    )
    text = plan_text(as_json(plan))
    assert text.startswith("✓ fits: 3.17 TiB of each rank to spare\n")  # 65 * 50 GiB
    assert "slack" not in text and "CUDA" not in text and "kept free" not in text
    assert "MFU" in plan_text(as_json(FITS)) and "MFU" not in text  # of no stated peak
    # 65 of 3,315 GiB would be no bar at all.
    assert "phases of a rank, allocated; a full bar is the fullest of them" in text
    (backward,) = (line for line in lines_of(text) if line[0] == "backward")
    assert len(backward[1]) > 20


@pytest.mark.parametrize("width", [72, 80, 100])
def test_no_line_is_wider_than_the_terminal(width: int):
    texts = [plan_text(as_json(plan), width=width) for plan in (FITS, TIGHT)]
    for text in (*texts, plan_table(choice_json(), width=width)):
        assert max(map(len, text.splitlines())) <= width
        assert "\x1b" not in text
    assert "GPU-hours" in text and "812.8" in text and "…" not in text
    long = "data.train=/data/" + "x" * 200  # what is copied from the terminal must run
    assert f" {long} " in plan_text(as_json(FITS), [long], width=width).splitlines()[-1]


def test_the_table_of_fallbacks():
    rows = {line[0]: line[1:] for line in lines_of(plan_table(choice_json()))}
    cost = ["21,845", "812.8"]
    less = "\N{MINUS SIGN}"
    assert rows["full, ZeRO-1"] == ["no", f"{less}12.0 GiB", "optimizer moments", *cost]
    assert rows["full, ZeRO-2"] == [
        "no",
        f"{less}60.0 GiB",
        "host: copies for loading",
        *cost,
    ]
    assert rows["full, ZeRO-3"][:2] == ["chosen", "8.00 GiB"]
    assert rows["lora"][:2] == ["fits", "8.00 GiB"]
    assert plan_table(choice_json()).splitlines()[-2:] == [
        "  full, one GPU: there are 32 GPUs",
        "  GPU-hours for 2.0B tokens",
    ]


def test_why_the_fallbacks_above_were_not_taken():
    assert why_not_above(choice_json()) == [
        "full, ZeRO-1 does not fit: each GPU lacks 12.0 GiB; "
        "most goes to optimizer moments: 16.0 GiB",
        "full, ZeRO-2 does not fit: each host lacks 60.0 GiB; "
        "most goes to copies for loading: 140 GiB",
        "full, one GPU: there are 32 GPUs",
    ]
    # One that was to fit was tried: where it is passed over, it ran out of memory.
    next_one = {**choice_json(), "chosen": "lora"}
    assert why_not_above(next_one)[-1] == (
        "full, ZeRO-3 was to fit, and ran out of memory when it was tried"
    )
    assert [row.chosen for row in fallback_rows(choice_json())] == [False] * 3 + [True, False]


def test_what_is_taken_only_where_there_is_room_is_named_apart():
    first, *others = PHASES
    plans = [
        dataclasses.replace(
            FITS,
            device=Memory((dataclasses.replace(first, **{name: 7 * GIB}), *others), 2 * GIB, GIB),
        )
        for name in ("if_room", "on_host")
    ]
    free, full = (plan_text(as_json(plan)) for plan in plans)
    assert "load takes 7.00 GiB more for a moment, only if they are free" in free
    assert "load takes 7.00 GiB of the host for each GPU: it has no room" in full
    # Neither is a part of the phase.
    assert free.replace(
        "\n  load takes 7.00 GiB more for a moment, only if they are free", ""
    ) == plan_text(as_json(FITS))
