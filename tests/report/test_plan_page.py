"""plan.html: the figures of the terminal, bars to scale, self-contained, and how it fits."""

from __future__ import annotations

import dataclasses
import html
import re
from pathlib import Path
from typing import Any

import pytest
from made_plans import FITS, GIB, TIGHT, as_json, choice_json

from posttrain_dist.planner.plan import Item
from posttrain_dist.report.page import asset
from posttrain_dist.report.plan.plan_page import plan_page, write_plan_page
from posttrain_dist.report.plan.stacks import kind_of, memory_chart

EVIL = '<script>alert("1")</script>'


def text_of(page: str) -> str:
    body = re.sub(r"<style>.*?</style>", "", page, flags=re.DOTALL)
    return re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]+>", " ", body)))


@pytest.fixture(scope="module")
def page() -> str:
    return plan_page(as_json(FITS), choice_json(), ["model.path=shape:llama3-70b", "engine=auto"])


def test_the_page_says_what_the_terminal_says(page: str):
    text = text_of(page)
    for part in (
        "Plan llama3-70b fits Fits: 8.00 GiB of each GPU to spare, beyond 4.00 GiB margin",
        "Memory of each GPU 68.0 GiB of 80.0 GiB",
        "allocated at the peak 65.0 GiB allocator slack 2.00 GiB CUDA context and NCCL 1.00 GiB",
        "compute 21.5 s binds network 9.25 s memory 2 s update 125 ms",
        "parameters 280 GiB gradients 70.0 GiB",
        "for 2.0B tokens: 812.8 GPU-hours",
        "full, ZeRO-1 no \N{MINUS SIGN}12.0 GiB optimizer moments 21,845",
        "full, one GPU no there are 32 GPUs",
        "full, ZeRO-3 chosen 8.00 GiB",
        "To train it posttrain train model.path=shape:llama3-70b engine=zero3",
        "ZeRO-3 costs more than it saves here",
        # item by phase: load, forward, backward, update, save
        "float32 master weights 8.00 GiB 8.00 GiB 8.00 GiB 8.00 GiB",
        "allocated 6.00 GiB 47.0 GiB 65.0 GiB 36.5 GiB 28.2 GiB",
    ):
        assert part in text, part
    assert "Does not fit: each GPU lacks 12.0 GiB" in text_of(plan_page(as_json(TIGHT)))
    assert "To train it" not in text_of(plan_page(as_json(FITS)))


def test_bars_are_on_the_scale_of_the_capacity():
    plan = as_json(FITS)
    chart = memory_chart(plan["device"], 80 * GIB, 4 * GIB, "CUDA context and NCCL")
    peak, *phases = chart.stacks
    assert sum(segment.width for segment in peak.segments) == pytest.approx(100 * 68 / 80)
    widths = [sum(segment.width for segment in stack.segments) for stack in phases]
    sizes = [6, 47, 65, 36.5, 28.25]
    assert widths == pytest.approx([100 * size / 80 for size in sizes], abs=0.01)
    assert (chart.margin, chart.limit, chart.over) == (95.0, 100.0, False)
    assert chart.ticks == tuple((12.5 * k, f"{10 * k} GiB" if k else "0") for k in range(9))
    # What is most at the peak comes first in every bar, so that one colour is in one place.
    assert [stack.segments[0].kind for stack in phases[1:]] == ["item-optimizer-moments"] * 4
    # Beyond the capacity, the peak is the scale, and the limit stands inside.
    small = memory_chart(plan["device"], 34 * GIB, 2 * GIB, "")
    assert small.over and small.margin == pytest.approx(100 * 32 / 68, abs=0.01)
    assert small.limit == pytest.approx(50)
    assert sum(part.width for part in small.stacks[0].segments) == pytest.approx(100, abs=0.01)
    # Where the capacity would leave nothing to be seen, the peak is the scale, too.
    huge = memory_chart(plan["device"], 68 * 51 * GIB, 4 * GIB, "")
    assert huge.limit is huge.margin is None and not huge.over
    assert sum(part.width for part in huge.stacks[0].segments) == pytest.approx(100, abs=0.01)


def test_every_item_has_a_colour():
    css = asset("plan.css")
    names = [*map(str, Item), "allocator slack", "CUDA context and NCCL"]
    assert [name for name in names if f".{kind_of(name)} " not in css.replace(",", " ")] == []


def test_the_page_is_one_file_without_scripts_and_escapes_what_it_is_given():
    evil = dataclasses.replace(FITS, settings={"model": EVIL}, warnings=(EVIL,))
    page = plan_page(as_json(evil), None, [f"name={EVIL}"])
    assert "<script" not in page and page.count("&lt;script&gt;") >= 3
    assert not re.search(r"(src|href)\s*=\s*[\"'](?!data:)|url\(|@import", page)
    assert len(page) < 100_000


@pytest.mark.browser
def test_the_page_fits_a_phone_and_a_screen(probed: Any, tmp_path: Path):
    write_plan_page(tmp_path / "plan.html", as_json(FITS), choice_json(), ["name=x" + "y" * 200])
    frames = "".join(
        f'<iframe style="border: 0; width: {width}px; height: 900px" src="plan.html"></iframe>'
        for width in (390, 1300)
    )
    looks = probed(
        frames
        + """<script>addEventListener("load", () => setTimeout(() => {
          const box = (e) => e.getBoundingClientRect();
          const look = (page) => {
            const root = page.documentElement, bars = page.querySelectorAll(".stacks");
            const stacks = [...bars[0].querySelectorAll(".stack")];
            const limit = box(page.querySelector(".limit")), peak = stacks[0];
            return {
              width: root.clientWidth, over: root.scrollWidth - root.clientWidth,
              ends: stacks.map((s) => (box(s.lastElementChild).right - box(s).left) / box(s).width),
              limit: (limit.left - box(peak).left) / box(peak).width,
              colour: getComputedStyle(peak.firstElementChild).backgroundColor,
            };
          };
          document.title = JSON.stringify([look(frames[0].document), look(frames[1].document)]);
        }, 300));</script>"""
    )
    assert [seen["width"] for seen in looks] == [390, 1300]
    for seen in looks:
        ends = [size / 80 for size in (68, 6, 47, 65, 36.5, 28.25)]
        assert seen["over"] <= 0 and seen["ends"] == pytest.approx(ends, abs=0.01)
        assert seen["limit"] == pytest.approx(1, abs=0.01)
        assert seen["colour"] == "rgb(144, 103, 220)"
