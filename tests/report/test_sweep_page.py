"""sweep.html: its figures, heat map and lines against the data, its escaping, how it fits."""

from __future__ import annotations

import html
import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest
from made_sweeps import final_loss, made_sweep

from posttrain_dist.report.sweep import write_sweep_page
from posttrain_dist.report.sweep.axes import axis_of, ordered_places
from posttrain_dist.report.sweep.curves import charts_of
from posttrain_dist.report.sweep.figures_of_sweep import cards_of, table_of
from posttrain_dist.report.sweep.heat_map import heat_map
from posttrain_dist.report.sweep.parallel import parallel
from posttrain_dist.report.sweep.sweep_page import sweep_page

EVIL = '</script><script>alert("1")</script>'


def text_of(page: str) -> str:
    body = re.sub(r"<(style|script).*?</\1>", "", page, flags=re.DOTALL)
    return re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]+>", " ", body)))


def test_the_page_says_what_the_data_says():
    data = made_sweep()
    text = text_of(sweep_page(data))
    pruned = sum(trial["state"] == "pruned" for trial in data["trials"])
    assert pruned == 8
    assert "leave it out" not in text
    shortened = text_of(sweep_page(data | {"winner": f"{data['winner']} train.steps=9"}))
    assert "train.steps=9 train.steps ends it early: leave it out" in shortened
    for part in (
        "Sweep mini-20261130-090000 completed, 1 failed 2026-11-30 09:00 · 51 trials",
        f"done {50 - pruned} pruned {pruned} failed 1",
        "Held-out loss of the best 1.000 trial 24 tuning.rank=16, optimizer.lr=3e-4",
        "To train the best in full posttrain train tuning=lora tuning.rank=16 optimizer.lr=3e-4",
        "24 16 3e-4 0 done 1.0000 \N{EN DASH} 100 of 100 2,400 12.0 GiB trial-024",
        "trial 50: optimizer.lr: the loss is not a number at step 3",
        "How it was made posttrain train -m tuning=lora",
    ):
        assert part in text, part


def test_costs_are_sums_and_what_was_given_up_is_a_share_of_them():
    data = made_sweep()
    cost = next(card for card in cards_of(data) if card.label == "Cost of all trials")
    whole, given_up = 42 * 2400, 8 * 960
    assert (cost.value, cost.unit) == (f"{(whole + given_up) / 3600:.3g}", "GPU-hours")
    assert cost.sub.startswith(f"{given_up / (whole + given_up):.1%} ")


def test_rows_compare_with_the_best():
    table = table_of(made_sweep())
    assert table["keys"] == ["rank", "lr", "dropout"]
    first, second = table["rows"][:2]
    assert first["is_best"] and not second["is_best"]
    assert (second["settings"], second["behind"]) == (["16", "3e-4", "0.1"], "+4.0 %")
    many = made_sweep()
    many["keys"] = [f"a.k{i}" for i in range(9)]
    assert table_of(many)["keys"] == ["Settings"]


def test_each_cell_of_the_map_is_its_best_trial():
    data = made_sweep()
    found = heat_map(data)
    assert found is not None
    assert (found.down.labels, found.others) == (("4", "8", "16", "32", "64"), ("tuning.dropout",))
    texts = {
        (rank, rate): cell.text
        for rank, cells in found.rows
        for rate, cell in zip(found.right.labels, cells, strict=True)
    }
    ran = {t["number"]: t["value"] for t in data["trials"] if t["state"] != "failed"}
    for rank, rate in itertools.product(found.down.labels, found.right.labels):
        values = [
            ran[trial["number"]]
            for trial in data["trials"]
            if trial["number"] in ran
            and (trial["varied"]["tuning.rank"], trial["varied"]["optimizer.lr"]) == (rank, rate)
        ]
        assert len(values) == 2
        assert texts[rank, rate] == f"{min(values):.3f}"
    cells = [cell for _, row in found.rows for cell in row]
    [best] = [cell for cell in cells if cell.is_best]
    assert (best.text, best.goodness, best.title.count("trial ")) == ("1.000", 1.0, 2)
    assert min(cell.goodness for cell in cells) == 0.0


def test_a_metric_that_is_to_grow_turns_the_map_around():
    data = made_sweep(dropouts=("0",))
    lowest = heat_map(data)
    data["direction"] = "maximize"
    highest = heat_map(data)
    assert lowest is not None and highest is not None
    for (_, low), (_, high) in zip(lowest.rows, highest.rows, strict=True):
        for one, other in zip(low, high, strict=True):
            assert one.goodness == pytest.approx(1 - other.goodness)


def test_a_map_needs_two_keys_that_vary():
    assert heat_map(made_sweep(rates=("3e-4",), dropouts=("0",))) is None
    other = heat_map(made_sweep(rates=("3e-4",)))
    assert other is not None
    assert (other.right.key, other.down.key) == ("tuning.rank", "tuning.dropout")


def test_an_axis_orders_numbers_and_bins_many():
    assert axis_of("a", ["16", "4", "1e-1"]).labels == ("1e-1", "4", "16")
    assert axis_of("a", ["lora", "16", "full"]).labels == ("lora", "16", "full")
    many = [f"{10 ** (-5 + i / 4):.6g}" for i in range(13)]  # 1e-5 to 1e-2
    axis = axis_of("lr", many)
    assert axis.labels[0] == "1e-05 to 3.2e-05" and len(axis.labels) == 6
    assert [axis.places[text] for text in many] == [min(i // 2, 5) for i in range(13)]
    assert axis.shares[many[6]] == pytest.approx(0.5, abs=1e-6)
    assert axis_of("lr", ["0.000316228", "0.00123457"]).labels == ("0.000316", "0.00123")


def test_places_are_by_order_and_equal_values_share_one():
    values = {0: 2.0, 1: 9.0, 2: 1.0, 3: 2.0}
    assert ordered_places(values, "minimize") == {0: 0.5, 1: 0.0, 2: 1.0, 3: 0.5}
    assert ordered_places(values, "maximize") == {0: 0.5, 1: 1.0, 2: 0.0, 3: 0.5}


def test_lines_run_through_their_values():
    data = made_sweep(ranks=("4", "16"), rates=("1e-4", "3e-4", "1e-3"), dropouts=("0",))
    view = parallel(data)
    assert view is not None
    assert [column.name for column in view.columns] == ["rank", "lr", "loss"]
    values = [final_loss(r, lr, 0) for r in (4, 16) for lr in (1e-4, 3e-4, 1e-3)]
    best, low, high = view.lines[-1], min(values), max(values)
    assert best.is_best and best.points == "0,0 50,50 100,100"
    of_4 = final_loss(4, 3e-4, 0)
    share = 100 * (1 - (of_4 - low) / (high - low))
    assert f"0,100 50,50 100,{share:.4g}" in [line.points for line in view.lines]
    assert parallel(made_sweep(rates=("3e-4",), dropouts=("0",))) is None


def test_curves_are_of_the_best_and_begin_behind_the_base_model():
    data = made_sweep()
    total, *channels = charts_of(data)
    assert [series["name"] for series in total["series"]][::-1][:2] == ["trial 24", "trial 25"]
    assert len(total["series"]) == 6 and total["series"][-1]["role"] == "t0"
    assert total["series"][-1]["x"] == [20, 40, 60, 80, 100]
    assert total["note"] == "3.000 → 1.000"
    short = made_sweep()
    short["trials"][1]["curves"]["eval/loss"][2:] = []
    assert charts_of(short)[0]["series"][-2]["x"] == [20]
    assert [chart["title"] for chart in channels] == ["chat", "maths", "code"]
    assert channels[1]["series"][-1]["y"][-1] == pytest.approx(1.2)
    data["metric"] = "eval_channel_loss/maths"
    assert [chart["title"] for chart in charts_of(data)][:2] == [
        "eval_channel_loss/maths",
        "all channels",
    ]


@pytest.mark.parametrize("trials", [[], None])
def test_a_sweep_without_a_value_has_a_page_too(trials, tmp_path):
    data = made_sweep()
    data |= {"best": None, "winner": None, "trials": trials or data["trials"][-1:]}
    if trials == []:
        data |= {"trials": [], "keys": []}
    text = text_of(write_sweep_page(tmp_path / "sweep.html", data).read_text(encoding="utf-8"))
    assert ("No trial has begun yet." in text) == (trials == [])
    assert "To train the best" not in text


def test_everything_from_outside_is_escaped_and_nothing_is_loaded():
    data = made_sweep()
    for trial in data["trials"]:
        trial["varied"] = {f"{key}{EVIL}": text + EVIL for key, text in trial["varied"].items()}
        trial["curves"] = {key + EVIL: curve for key, curve in trial["curves"].items()}
        trial |= {"error": EVIL, "folder": EVIL, "state": EVIL}
    data["keys"] = [key + EVIL for key in data["keys"]]
    named = dict.fromkeys(("name", "winner", "command", "folder", "created", "unit"), EVIL)
    page = sweep_page(data | named | {"metric": "eval/loss" + EVIL})
    assert heat_map(data) is not None and parallel(data) is not None
    assert page.count("<script") == 2  # the data of the charts, and what draws them
    assert not re.search(r"(src|href)\s*=\s*[\"'](?!data:)|url\(|@import", page)
    charts = re.search(r'id="charts">(.*?)</script>', page, re.DOTALL)
    assert charts and json.loads(charts.group(1))


PROBE = """<script>
window.faults = [];
addEventListener("error", (e) => window.faults.push(String(e.message)));
addEventListener("securitypolicyviolation", (e) => window.faults.push(e.violatedDirective));
addEventListener("load", () => setTimeout(() => {
  const root = document.documentElement, box = (e) => e.getBoundingClientRect();
  const colour = (e) => getComputedStyle(e).backgroundColor;
  const outside = [...document.querySelectorAll(".column b, .column span")].filter(
    (e) => box(e).left < box(e.closest(".parallel")).left
      || box(e).right > box(e.closest(".parallel")).right);
  const heads = [...document.querySelectorAll(".column b")].map(box);
  root.dataset.probe = JSON.stringify({
    errors: window.faults, width: root.clientWidth, over: root.scrollWidth - root.clientWidth,
    drawn: [...document.querySelectorAll(".plot svg")].filter(
      (s) => s.querySelector("path.line").getTotalLength() > 50).length,
    outside: outside.map((e) => e.textContent),
    overlaps: heads.slice(1).filter((b, i) => b.left < heads[i].right).length,
    colours: new Set([...document.querySelectorAll(".map td.valued")].map(colour)).size,
  });
}, 50));
</script>"""


@pytest.mark.browser
@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_fits_a_phone_and_a_screen(probed: Any, tmp_path: Path, width: int):
    page = sweep_page(made_sweep() | {"command": "x" * 500})
    page = page.replace("<head>", "<head>" + PROBE)
    (tmp_path / "probe.html").write_text(page, encoding="utf-8")
    seen = probed(
        f'<iframe style="border: 0; width: {width}px; height: 900px" src="probe.html"></iframe>'
        "<script>addEventListener('load', () => setTimeout(() => { document.title ="
        " frames[0].document.documentElement.dataset.probe; }, 400));</script>"
    )
    assert seen["errors"] == [] and seen["outside"] == [] and seen["overlaps"] == 0
    assert seen["width"] == width and seen["over"] <= 0
    assert seen["drawn"] == 4
    assert seen["colours"] == 12  # 3 distances of ranks times 4 of rates
