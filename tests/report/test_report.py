"""The report of a synthetic run: its numbers, its escaping, and how it looks in a browser."""

import html
import json
import math
import random
import re
import struct
from pathlib import Path
from typing import Any

import pytest

from posttrain_dist.errors import PosttrainError
from posttrain_dist.report import write_report
from posttrain_dist.report.run.figures import header_of
from posttrain_dist.report.run.read import Series, read_run, thin

EVIL = '<script>alert("1")</script>'
STEPS = 60
# channel -> (share, loss before training, loss it tends to)
CHANNELS = {
    "arithmetic": (0.30, 3.1, 0.35),
    "sort": (0.20, 2.6, 0.12),
    "reverse": (0.15, 2.9, 0.22),
    "extract": (0.15, 2.2, 0.55),
    "docstring": (0.15, 3.4, 2.6),
    EVIL: (0.05, 2.0, 2.4),  # the one that gets worse
}
CONFIG = """\
name: first <b>try</b>
seed: 3
model: {path: /models/tiny_base, attention: auto}
data: {train: embedded, max_length: 512}
objective: {kind: sft}
tuning: {kind: full}
engine: {kind: deepspeed, stage: 3, offload: false}
cluster: {kind: ray, workers: 2}
choices: {objective: sft, tuning: full, engine: zero3, cluster: ray}
"""


def noise(step: int, salt: int) -> float:
    """A fixed number in [-1, 1]."""
    return random.Random(1000 * salt + step).uniform(-1, 1)


def channel_loss(channel: str, step: int) -> float:
    _, start, end = CHANNELS[channel]
    return end + (start - end) * math.exp(-step / 18)


def rows() -> list[dict[str, float]]:
    found = []
    for step in range(STEPS + 1):
        row: dict[str, float] = {"step": step, "time_s": 2.0 + 1.5 * step}
        losses = {channel: channel_loss(channel, step) for channel in CHANNELS}
        if step:
            row["train/lr"] = 3e-4 * min(1, step / 6) * (0.5 + 0.5 * math.cos(step / STEPS * 3))
            row["train/grad_norm"] = 0.4 + 2 * math.exp(-step / 9) + 0.1 * noise(step, 1)
            row["train/tokens_per_s"] = 5200 + 300 * noise(step, 2)
            row["system/memory_bytes"] = (610 + 20 * min(step, 10) / 10) * 2**20
            for k, channel in enumerate(CHANNELS):
                row[f"channel_loss/{channel}"] = losses[channel] * (1 + 0.12 * noise(step, k))
                row[f"channel_share/{channel}"] = CHANNELS[channel][0]
            row["train/loss"] = sum(CHANNELS[c][0] * row[f"channel_loss/{c}"] for c in CHANNELS)
        if step % 15 == 0:
            row["eval/loss"] = sum(CHANNELS[c][0] * losses[c] for c in CHANNELS)
            row |= {f"eval_channel_loss/{channel}": loss for channel, loss in losses.items()}
        found.append(row)
    return found


def write_json(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


ANSWERS = {
    "exact_match": {
        "before": {"arithmetic": {"right": 1, "of": 32}, "sort": {"right": 2, "of": 32}},
        "after": {"arithmetic": {"right": 30, "of": 32}, "sort": {"right": 29, "of": 32}},
    },
    "samples": [
        {
            "channel": "docstring",
            "prompt": "Write the docstring.\n\ndef mean(values):\n    return sum(values)",
            "reference": "Return the mean of values.",
            "before": "the the " + "x" * 300,
            "after": "Return the arithmetic mean of the values.",
        },
        {
            "channel": EVIL,
            "prompt": "Say " + EVIL,
            "reference": "</pre></div>",
            "before": "",
            "after": f"sure: {EVIL}",
        },
    ],
}


def build_run(folder: Path) -> Path:
    """A whole run folder of a completed run."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(CONFIG)
    (folder / "overrides.yaml").write_text("- optimizer.lr=3e-4\n- engine=zero3\n")
    lines = [json.dumps(row) for row in rows()]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 61, "train/loss": 9.87')
    write_json(
        folder / "run.json",
        {
            "id": "first/2026-01-02T03-04-05",
            "name": "first",
            "created": "2026-01-02T03:04:05+00:00",
            "command": ["posttrain", "train", "optimizer.lr=3e-4", "name=first try"],
            "versions": {"posttrain-dist": "0.1.0", "torch": "2.13.0", "deepspeed": "0.19.8"},
            "git": "0123456789abcdef0123456789abcdef01234567",
            "wandb_id": "x1y2z3",
            "hashes": {"data": "a" * 64, "config": "b" * 64},
        },
    )
    write_json(folder / "logs" / "plan.json", {"total_steps": STEPS, "start_step": 0})
    write_json(
        folder / "logs" / "outcome.json",
        {"outcome": "completed", "step": STEPS, "total_steps": STEPS},
    )
    for rank in (0, 1):
        (folder / "logs" / f"rank-{rank}.log").write_text("")
    write_json(folder / "FINISHED", {"reason": "completed", "step": STEPS})
    write_json(
        folder / "prepared" / "summary.json",
        {
            "channels": list(CHANNELS),
            "splits": {
                split: {
                    c: {
                        "rows": n,
                        "tokens": 91 * n,
                        "supervised": 37 * n,
                        "truncated": 7,
                        "lengths": [[64, 0], [96, n]],
                    }
                    for c in CHANNELS
                }
                for split, n in (("train", 1200), ("eval", 64))
            },
            "duplicates_moved": 3,
            "inputs": {"max_length": 512, "data": {"train": {"0:train.jsonl": "c" * 64}}},
        },
    )
    (folder / "data_report.html").write_text("<html></html>")
    write_json(folder / "answers.json", ANSWERS)
    return folder


class Page:
    """A written report and its visible text."""

    def __init__(self, folder: Path) -> None:
        self.source = write_report(folder).read_text(encoding="utf-8")
        body = re.sub(r"<(script|style)\b.*?</\1>", "", self.source, flags=re.DOTALL)
        self.text = re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]+>", " ", body)))
        data = re.search(r'id="charts">(.*?)</script>', self.source, re.DOTALL)
        self.charts = {c["title"]: c for c in json.loads(data.group(1))}

    def line(self, title: str, name: str) -> tuple[list[int], list[float]]:
        (found,) = (s for s in self.charts[title]["series"] if s["name"] == name)
        return found["x"], found["y"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_run(tmp_path_factory.mktemp("runs") / "2026-01-02T03-04-05")


@pytest.fixture(scope="module")
def page(folder: Path) -> Page:
    return Page(folder)


def test_key_figures(page: Page) -> None:
    before = sum(share * start for share, start, _ in CHANNELS.values())
    left = math.exp(-STEPS / 18)
    after = sum(s * (end + (start - end) * left) for s, start, end in CHANNELS.values())
    assert f"Held-out loss {before:.3f} → {after:.3f}" in page.text
    assert f"\N{MINUS SIGN}{100 * (1 - after / before):.1f} % from step 0 to 60" in page.text
    assert "Exact match 5 % → 92 % 59 of 64 held-out answers right" in page.text
    assert "Wall time 1 min 32 s 60 optimizer steps" in page.text  # 2 + 1.5 * 60
    assert "Peak memory 630 MiB" in page.text
    assert "Layout 2 workers ZeRO-3 · ray" in page.text
    rates = sorted(5200 + 300 * noise(step, 2) for step in range(1, STEPS + 1))
    assert f"Throughput {(rates[29] + rates[30]) / 2:,.0f} tokens/s" in page.text
    best = 0.12 + (2.6 - 0.12) * left  # sort falls most, relative to where it began
    change = f"{100 * (1 - best / 2.6):.1f} %"
    assert f"Best channel \N{MINUS SIGN}{change} sort: 2.600 → {best:.3f}" in page.text
    assert "completed 2026-01-02 03:04 · first/2026-01-02T03-04-05 · step 60 of 60" in page.text


def test_channel_table(page: Page) -> None:
    for channel, (share, start, end) in CHANNELS.items():
        after = end + (start - end) * math.exp(-STEPS / 18)
        sign = "+" if after > start else "\N{MINUS SIGN}"
        change = f"{sign}{abs(100 * (after / start - 1)):.1f} %"
        assert f"{channel} {start:.3f} {after:.3f} {change} " in page.text
        assert re.search(rf"{re.escape(change)} [^a-z%]* {share:.1%} ", page.text)
    assert re.search(r"arithmetic 3\.100 [^a-z]* % 1 / 32 30 / 32 30\.0% ", page.text)
    assert re.search(r"reverse 2\.900 [^a-z]* % \u2013 \u2013 15\.0% ", page.text)  # asked nothing


def test_charts_hold_the_logged_numbers(page: Page) -> None:
    x, y = page.line("sort", "held-out")
    assert x == [0, 15, 30, 45, 60]
    assert y == pytest.approx([channel_loss("sort", step) for step in x], rel=1e-5)
    x, y = page.line("Learning rate", "learning rate")
    assert (x[0], x[-1]) == (1, STEPS)
    assert y == pytest.approx([row["train/lr"] for row in rows()[1:]], rel=1e-5)
    _, y = page.line("Memory of the largest worker", "memory")
    assert y[0] == pytest.approx(612) and y[-1] == pytest.approx(630)  # MiB
    # The faint line is what was logged, the strong one its mean over two steps to each side.
    raw, strong = page.line("arithmetic", "")[1], page.line("arithmetic", "training")[1]
    logged = [row["channel_loss/arithmetic"] for row in rows()[1:]]
    assert raw == pytest.approx(logged, rel=1e-5)
    for i in (2, 3, 30, 57):
        assert strong[i] == pytest.approx(sum(logged[i - 2 : i + 3]) / 5, rel=1e-5)
    assert strong[1] == pytest.approx(sum(logged[:3]) / 3, rel=1e-5)
    assert (strong[0], strong[-1]) == pytest.approx((logged[0], logged[-1]), rel=1e-5)


def test_text_from_data_is_escaped(page: Page) -> None:
    assert page.source.count("<script") == 2  # the data and the program, both of this project
    assert page.source.count("</script") == 2
    assert "<b>try</b>" not in page.source
    assert EVIL in page.text and f"Say {EVIL}" in page.text and "first <b>try</b>" in page.text
    assert "</pre></div>" in page.text
    assert EVIL in page.charts


def test_the_page_needs_no_network(page: Page) -> None:
    assert len(page.source) < 1_000_000
    source = page.source.replace('href="data_report.html"', "")  # a link beside the page
    assert not re.search(r"(src|href)\s*=\s*[\"'](?!data:)|url\(|@import|fetch\(", source)
    addresses = set(re.findall(r"https?://[^\s\"'<]+", page.source))
    assert addresses == {"http://www.w3.org/2000/svg"}  # a name, never loaded


def test_data_config_and_lineage_are_shown(page: Page) -> None:
    heads = "rows tokens supervised truncated"
    assert f"training {heads} arithmetic 1,200 109,200 44,400 7" in page.text
    assert f"held-out {heads} arithmetic 64 5,824 2,368 7" in page.text
    assert "held-out rows left to training 3 " in page.text
    assert '<a href="data_report.html">' in page.source
    assert "0:train.jsonl " + "c" * 64 in page.text
    assert "engine: {kind: deepspeed, stage: 3, offload: false}" in page.text
    assert "posttrain train optimizer.lr=3e-4 'name=first try'" in page.text
    assert "versions posttrain-dist 0.1.0 torch 2.13.0" in page.text
    assert "b" * 64 in page.text


@pytest.mark.parametrize(
    ("data", "shown"),
    [
        ("{train: /d/chat.jsonl}", "/d/chat.jsonl"),
        ("{train: embedded, sources: {}}", "embedded"),
        ("{train: embedded, sources: {a: {path: x}, b: {path: y}}}", "2 sources: a, b"),
        ("{train: embedded, sources: {a: {path: x}}}", "a"),
    ],
)
def test_the_header_names_what_was_trained_on(data: str, shown: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(f"name: x\ndata: {data}\n")
    assert ("data", shown) in header_of(read_run(tmp_path))["facts"]


def test_a_torn_last_line_is_passed_over(page: Page) -> None:
    assert "9.87" not in page.source
    assert page.line("Mean over all channels", "training")[0][-1] == STEPS


def test_a_run_that_just_began(tmp_path: Path) -> None:
    lines = [{"step": 0, "eval/loss": 2.5, "time_s": 1.0}]
    lines.append({"step": 1, "train/loss": 2.25, "train/grad_norm": float("nan"), "time_s": 61.0})
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "metrics.jsonl").write_text(text)
    (tmp_path / "run.json").write_text('{"id": "torn')
    page = Page(tmp_path)
    assert "not finished" in page.text and "Wall time 1 min 1 s" in page.text
    assert "Held-out loss 2.500 at step 0" in page.text
    assert list(page.charts) == ["Mean over all channels"]  # a NaN alone makes no chart
    assert page.line("Mean over all channels", "training") == ([1], [2.25])


def test_a_run_without_a_step(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(CONFIG)
    page = Page(tmp_path)
    assert "No step has been logged yet" in page.text and page.charts == {}
    assert "Layout 2 workers" in page.text


def test_a_stopped_run_says_where(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 40, "train/loss": 1.5}\n')
    ending = {"outcome": "stopped", "step": 40, "total_steps": 1000}
    write_json(tmp_path / "logs" / "outcome.json", ending)
    page = Page(tmp_path)
    assert "stopped step 40 of 1,000" in page.text and "completed" not in page.text


def test_long_lines_keep_their_spikes() -> None:
    y = [1.0 + 0.001 * noise(i, 3) for i in range(50_000)]
    y[31_337], y[777] = 9.0, -4.0
    kept = thin(Series(list(range(50_000)), y), 400)
    assert len(kept.x) <= 400 and kept.x == sorted(set(kept.x))
    points = dict(zip(kept.x, kept.y, strict=True))
    assert points[31_337] == 9.0 and points[777] == -4.0
    assert {0, 49_999} <= set(points) and all(y[x] == value for x, value in points.items())


def test_no_run_folder(tmp_path: Path) -> None:
    with pytest.raises(PosttrainError, match=r"no run folder.*config\.yaml"):
        write_report(tmp_path)
    with pytest.raises(PosttrainError, match=re.escape(str(tmp_path / "gone"))):
        write_report(tmp_path / "gone")
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------------------- browser

PROBE = """<script>
addEventListener("load", () => setTimeout(() => {
  const root = document.documentElement;
  const wide = [...document.querySelectorAll("text")].filter((t) => {
    const box = t.getBBox(), plot = t.ownerSVGElement.viewBox.baseVal;
    return box.x < -0.5 || box.x + box.width > plot.width + 0.5;
  });
  const plot = document.querySelector(".plot");
  const at = plot.getBoundingClientRect();
  plot.dispatchEvent(new PointerEvent("pointermove", {clientX: at.right - 14, clientY: at.top}));
  document.querySelectorAll("details").forEach((d) => { d.open = true; });
  root.dataset.probe = JSON.stringify({
    errors: window.faults, over: root.scrollWidth - root.clientWidth, width: root.clientWidth,
    plots: document.querySelectorAll(".plot").length,
    drawn: [...document.querySelectorAll(".plot svg")].filter(
      (s) => s.querySelector("path.line").getTotalLength() > 50).length,
    colours: ["train", "heldout"].map(
      (c) => getComputedStyle(plot.querySelector("path.line." + c)).stroke),
    cut: wide.map((t) => t.textContent), tip: plot.querySelector(".tip").innerText,
  });
}, 50));
</script>"""
FAULTS = """<script>
window.faults = [];
addEventListener("error", (e) => window.faults.push(String(e.message)));
addEventListener("securitypolicyviolation", (e) => window.faults.push(e.violatedDirective));
</script>"""
FRAME = '<iframe style="border: 0; width: {width}px; height: 900px" src="{name}"></iframe>'


@pytest.mark.browser
@pytest.mark.parametrize("width", [390, 800, 1400])
def test_the_page_fits_and_draws_without_errors(
    probed: Any, folder: Path, tmp_path: Path, width: int
) -> None:
    source = write_report(folder).read_text(encoding="utf-8")
    source = source.replace("<head>", "<head>" + FAULTS).replace("</body>", PROBE + "</body>")
    (tmp_path / "probe.html").write_text(source, encoding="utf-8")
    # A frame: Chromium's own window is never narrower than 500 pixels.
    outer = FRAME.format(width=width, name="probe.html") + (
        "<script>addEventListener('load', () => setTimeout(() => { document.title ="
        " frames[0].document.documentElement.dataset.probe; }, 400));</script>"
    )
    seen = probed(outer)
    assert seen["errors"] == [] and seen["cut"] == []
    assert seen["width"] == width and seen["over"] <= 0
    assert seen["plots"] == seen["drawn"] == 1 + len(CHANNELS) + 4
    assert seen["colours"] == ["rgb(37, 99, 201)", "rgb(196, 86, 10)"]
    after = sum(share * channel_loss(c, STEPS) for c, (share, *_) in CHANNELS.items())
    assert f"step {STEPS}" in seen["tip"] and f"held-out {after:.4g}" in seen["tip"]


@pytest.mark.browser
def test_the_page_can_be_printed_to_an_image(chromium: Any, folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "page.png"
    report = write_report(folder)
    arguments = [f"--screenshot={path}", "--window-size=1400,1000", "--virtual-time-budget=2000"]
    chromium(tmp_path / "profile", *arguments, f"file://{report}")
    assert struct.unpack(">II", path.read_bytes()[16:24]) == (1400, 1000)
    assert path.stat().st_size > 40_000  # a blank page of this size has 5 kB
