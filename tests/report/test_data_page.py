"""The data report: its numbers, its masks, its escaping, and how it looks in a browser."""

import json
import random
import re
import struct
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from posttrain_dist.report.data.data_page import data_page

EVIL = '</script><img src=x onerror="window.hacked=1">'
# What cannot be written, drives a terminal, turns a line around, or cannot be seen.
HIDDEN = "\ud800\x00\x1b[31m\u202e\u200b\u00a0"
SPELLED = "<U+D800><U+0000><U+001B>[31m<U+202E><U+200B><U+00A0>"
MARKED = SPELLED.replace("<", "").replace(">", "")  # on the page, where a chip is drawn around
EDGES = [8, 11, 16, 23, 32, 45, 64, 91, 128, 181, 256, 362, 512, 724, 1024, 1448, 2048, 2896]


def conversation(question: str, answer: str, weight: float = 1.0) -> list[list]:
    def words(text: str, weight: float) -> list[list]:
        return [[word, weight, False] for word in re.findall(r"\s?\w+|[^\w\s]+|\s", text)]

    start, end, line = "<|im_start|>", "<|im_end|>", ["\n", 0.0, False]
    asked = [[start, 0.0, True], *words("user\n" + question, 0.0), [end, 0.0, True], line]
    answered = [*words(answer, weight), [end, weight, True]]
    return [*asked, [start, 0.0, True], *words("assistant\n", 0.0), *answered, line]


def example(where: str, split: str, pieces: list[list]) -> dict:
    supervised = sum(piece[1] > 0 for piece in pieces)
    counts = {"tokens": len(pieces), "supervised": supervised}
    return {"where": where, "split": split, **counts, "pieces": pieces}


CODE = "Here:\n\n\tdef f(x):\n    return  x \n"
EXAMPLES = {
    "code": [
        example("code.jsonl:12", "train", conversation("Write f.", CODE)),
        example("code.jsonl:98", "eval", conversation("Reverse.", "fer", 0.5)),
    ],
    EVIL: [example(f"{EVIL}:5", "train", conversation(EVIL, f"</pre>{HIDDEN}{EVIL}", 2.0))],
}
CHANNELS = ["code", "chat", EVIL]


def counts(channel: str, split: str) -> dict:
    draw = random.Random(f"{channel} {split}")
    lengths = [[edge, draw.randint(0, 900)] for edge in EDGES]
    figures = ("tokens", "supervised", "truncated", "dropped", "duplicates", "near_duplicates")
    drawn = {key: draw.randint(10**2, 10**7) for key in figures}
    samples = sum(count for _, count in lengths)
    return {"rows": samples + drawn["dropped"], "samples": samples, **drawn, "lengths": lengths}


def check(name: str, level: str, failed: int, rows: list[str]) -> dict:
    texts = {"explain": f"explains {name}", "fix": f"fixes {name}"}
    return {"name": name, "level": level, **texts, "checked": 5023, "failed": failed, "rows": rows}


PIECES = [
    [*piece, sample]
    for sample in range(3)
    for piece in conversation(f"Question {sample}?", "yes " * (3 + sample))
]
REPORT = {
    "format": 2,
    "name": "first <b>try</b>",
    "settings": {
        "max_length": 2048,
        "template": "chatml",
        "template_sha256": "ab" * 32,
        "policy": "assistant",
        "long_rows": "truncate",
        "form": "auto",
        "strict": True,
        "tokenizer": "some/tokenizer",
    },
    "files": [
        {
            "path": f"/data/{name}.jsonl",
            "split": "train",
            "source": "main",
            "format": "messages",
            "rows": rows,
            "rejected": rejected,
        }
        for name, rows, rejected in (("code", 41_251, 113), (EVIL, 98_765, 0))
    ],
    "channels": CHANNELS,
    "splits": {split: {c: counts(c, split) for c in CHANNELS} for split in ("train", "eval")},
    "duplicates_moved": 31,
    "near_leaks": 12,
    "checks": [
        check("double_bos", "error", 0, []),
        check("control_tokens", "warning", 2, ["code.jsonl:12", EVIL]),
        check("prompt_prefix", "error", 153, [f"file.jsonl:{k * 91}" for k in range(20)]),
    ],
    "rejected": [
        {
            "file": "code.jsonl",
            "line": 7001,
            "byte": 90210,
            "field": "messages[1].content",
            "what": "is a number",
            "fix": "write a text",
        },
        {"file": EVIL, "line": 1, "byte": 0, "field": None, "what": EVIL + HIDDEN, "fix": EVIL},
    ],
    "sources": {
        "code": {"asked": 0.5, "rows_share": 0.493, "token_share": 0.611, "passes": 1.3},
        EVIL: {"asked": 0.5, "rows_share": 0.507, "token_share": 0.389, "passes": None},
    },
    "examples": EXAMPLES,
    "batch": {"tokens": len(PIECES), "samples": 3, "pieces": PIECES},
}


class Page(HTMLParser):
    """A page as a browser reads it: tags, text, and what stands in each block of tokens."""

    def __init__(self, report: dict) -> None:
        super().__init__()
        self.source = data_page(report)
        self.tags: list[tuple[str, dict]] = []
        self.blocks: list[list[list]] = []  # of tokens: [text, learned, special]
        self.words: list[str] = []
        self._inside = ""
        self.feed(self.source)
        self.close()
        self.text = re.sub(r"\s+", " ", " ".join(self.words))

    def handle_starttag(self, tag: str, attrs: list) -> None:
        found = dict(attrs)
        kind = found.get("class") or ""
        self.tags.append((tag, found))
        self._inside = tag
        if tag == "pre" and kind == "tokens":
            self.blocks.append([])
        elif tag == "span" and kind in ("r s", "r m"):
            self.learned = kind == "r s"
        elif tag == "i" and self.blocks:
            self.blocks[-1].append(["", self.learned, kind == "c"])

    def handle_data(self, data: str) -> None:
        if self._inside in ("script", "style"):
            return
        self.words.append(data)
        if self.blocks and self._inside in ("i", "u"):
            self.blocks[-1][-1][0] += data

    def handle_endtag(self, tag: str) -> None:
        if tag in ("i", "script", "style"):
            self._inside = ""
        elif tag == "u":
            self._inside = "i"

    def tips(self) -> list[str]:
        return [found["data-tip"] for _, found in self.tags if "data-tip" in found]


@pytest.fixture(scope="module")
def page() -> Page:
    return Page(REPORT)


def seen(pieces: list[list]) -> list[list]:
    """Pieces as the page must show them."""
    return [[p[0].replace(HIDDEN, MARKED), p[1] > 0, p[2]] for p in pieces]


def shown(text: str) -> str:
    """Hidden characters one by one, as each is a token of its own here."""
    for char in "\ud800\x00\x1b\u202e\u200b\u00a0":
        text = text.replace(char, f"U+{ord(char):04X}")
    return text


def test_tables_hold_every_count(page: Page) -> None:
    keys = ("rows", "samples", "tokens", "supervised")
    rest = ("truncated", "dropped", "duplicates", "near_duplicates")
    for split in ("train", "eval"):
        for channel, found in REPORT["splits"][split].items():
            cells = [f"{found[key]:,}" for key in keys]
            cells.append(f"{found['supervised'] / found['tokens']:.1%}")
            cells += [f"{found[key]:,}" for key in rest]
            assert f"{channel} {' '.join(cells)} " in page.text
        sums = {k: sum(c[k] for c in REPORT["splits"][split].values()) for k in (*keys, *rest)}
        assert f"all channels {' '.join(f'{sums[key]:,}' for key in keys)} " in page.text
        assert " ".join(f"{sums[key]:,}" for key in rest) in page.text


def test_all_other_figures_and_texts_are_there(page: Page) -> None:
    for name in ("control_tokens", "prompt_prefix"):
        assert f"explains {name} To fix it: fixes {name} " in page.text
    for row in (*REPORT["checks"][2]["rows"], "and 133 more", "153 of 5,023 fail"):
        assert f" {row} " in page.text
    assert "double_bos 5,023 checked explains double_bos" in page.text
    assert "code.jsonl:7001 90,210 messages[1].content is a number write a text" in page.text
    assert f"{EVIL}:1 0 \u2013 {EVIL}{SPELLED} {EVIL}" in page.text
    assert "113 rows could not be used; the first 2 are listed" in page.text
    assert "code 50.0% 49.3% 61.1% 1.3 " in page.text
    assert f"{EVIL} 50.0% 50.7% 38.9% \u2013 " in page.text
    assert "/data/code.jsonl train main messages 41,251 113" in page.text
    assert f"/data/{EVIL}.jsonl train main messages 98,765 0" in page.text
    assert "near; 31 exact left to training" in page.text and "Held-out leaks 12 " in page.text
    settings = REPORT["settings"]
    for value in (settings["template_sha256"], "chatml", "truncate", "some/tokenizer", "2,048"):
        assert f" {value} " in page.text
    for found in EXAMPLES["code"]:
        split = {"train": "training", "eval": "held-out"}[found["split"]]
        counts = f"{found['tokens']} tokens {found['supervised']} supervised"
        assert f"{found['where']} {split} {counts}" in page.text


def test_every_bin_is_told(page: Page) -> None:
    for channel in CHANNELS:
        both = [dict(REPORT["splits"][s][channel]["lengths"]) for s in ("train", "eval")]
        totals = [sum(some.values()) for some in both]
        for low, edge in zip([4, *EDGES], EDGES, strict=False):
            told = [f"{low + 1:,} to {edge:,} tokens"]
            for name, some, total in zip(("training", "held-out"), both, totals, strict=True):
                told.append(f"{name} {some[edge]:,} ({some[edge] / total:.1%})")
            assert "\n".join(told) in page.tips()


def test_masks_are_those_of_the_pieces(page: Page) -> None:
    conversations = [e["pieces"] for found in EXAMPLES.values() for e in found]
    packed = [[p[:3] for p in PIECES if p[3] == sample] for sample in range(3)]
    expected = [
        [[shown(text), weight > 0, special] for text, weight, special in pieces]
        for pieces in [*conversations, *packed]
    ]
    assert page.blocks == expected
    assert [f["data-w"] for _, f in page.tags if "data-w" in f] == ["0.5", "2"]


def test_a_pack_shows_its_borders(page: Page) -> None:
    at = 0
    for sample in range(3):
        inside = [p for p in PIECES if p[3] == sample]
        targets = sum(p[1] > 0 for p in inside)
        span = f"tokens {at} to {at + len(inside) - 1}"
        assert f"sample {sample} {span} {len(inside)} tokens {targets} supervised" in page.text
        assert f"sample {sample}\n{len(inside)} tokens\n{targets} supervised" in page.tips()
        at += len(inside)
    fill = f"({len(PIECES) / 2048:.1%})"
    assert f"3 samples fill {len(PIECES)} of 2,048 tokens {fill}" in page.text


def test_a_long_conversation_keeps_both_ends() -> None:
    pieces = [[f" t{k}", float(k % 7 == 0), False] for k in range(9000)]
    page = Page({"examples": {"a": [example("f:1", "train", pieces)]}})
    head, tail = page.blocks
    assert head + tail == seen(pieces[: len(head)] + pieces[-len(tail) :])
    cut = 9000 - len(head) - len(tail)
    assert len(tail) >= 1000 and f" {cut:,} tokens not shown" in page.text
    firsts = [int(f["data-first"]) for tag, f in page.tags if "data-first" in f]
    assert firsts == [0, 9000 - len(tail)]


def test_text_from_data_is_only_text(page: Page) -> None:
    tags = [tag for tag, _ in page.tags]
    assert tags.count("script") == 1 and "img" not in tags and "b" in tags
    names = {name for _, found in page.tags for name in found}
    assert not {name for name in names if name.startswith("on") or name in ("src", "srcdoc")}
    assert {f["href"] for _, f in page.tags if "href" in f} <= {
        "data:,",
        *(f"#{part}" for part in ("check-0", "check-1", "rejected", "channels")),
    }
    page.source.encode()  # a lone surrogate would not pass
    assert not re.search("[\x00\x1b\u202e\u200b\u00a0]", page.source)
    assert "first <b>try</b>" in page.text and f"/data/{EVIL}.jsonl" in page.text


def test_the_page_needs_no_network(page: Page) -> None:
    assert not re.search(r"url\(|@import|fetch\(|https?://", page.source)
    policy = next(f["content"] for _, f in page.tags if f.get("http-equiv"))
    assert "default-src 'none'" in policy and "script-src 'sha256-" in policy
    assert "unsafe-inline" not in policy.split("script-src")[1]


def test_the_verdict_leads_to_its_reasons(page: Page) -> None:
    assert "Training does not start on this data: 1 error" in page.text
    links = [(f["href"][1:]) for tag, f in page.tags if tag == "a"]
    assert links == ["check-0", "check-1", "rejected", "channels"]  # the error first
    ids = [found.get("id") for _, found in page.tags]
    assert all(ids.count(link) == 1 for link in links)
    assert page.text.index("explains prompt_prefix") < page.text.index("explains control_tokens")


def test_any_part_may_be_missing_or_empty() -> None:
    assert "No check was made" in Page({}).text
    for key in REPORT:
        less = {name: value for name, value in REPORT.items() if name != key}
        empty = type(REPORT[key])()
        for report in (less, REPORT | {key: empty}):
            text = Page(report).text
            assert ("Conversations" in text) == bool(report.get("examples"))
            assert ("One packed batch" in text) == bool(report.get("batch"))
            assert ("Lengths" in text) == bool(report.get("splits"))


# ---------------------------------------------------------------------------------- browser

# Runs outside of the page, which lets no program run but its own.
PROBE = """
<iframe style="border: 0; width: {width}px; height: 900px" src="page.html"></iframe><script>
addEventListener("load", () => setTimeout(() => {
  const page = frames[0], at = page.document, root = at.documentElement, errors = [];
  page.addEventListener("error", (e) => errors.push(String(e.message)));
  const point = (node) => {
    const box = node.getBoundingClientRect();
    const where = {clientX: box.x + 2, clientY: box.y + 2, bubbles: true};
    node.dispatchEvent(new page.PointerEvent("pointermove", where));
    return at.getElementById("tip").innerText;
  };
  const bin = point(at.querySelector(".bin"));
  const button = at.querySelector("button.all"), shown = !button.hidden;
  button.click();
  at.querySelectorAll("details").forEach((d) => { d.open = true; });
  const tokens = [...at.querySelectorAll(".tokens")].slice(0, 3).map(
    (pre) => point([...pre.querySelectorAll(".s > i")][1]));
  const tip = at.getElementById("tip").getBoundingClientRect();
  document.title = JSON.stringify({
    errors, bin, tokens, shown, hacked: page.hacked ?? null,
    over: root.scrollWidth - root.clientWidth, width: root.clientWidth,
    tip: tip.left >= 0 && tip.right <= root.clientWidth,
    cut: [...at.querySelectorAll(".hist .x, .hist .y b")].filter((t) => {
      const text = t.getBoundingClientRect(), box = t.closest(".chart").getBoundingClientRect();
      return text.left < box.left || text.right > box.right || text.bottom > box.bottom;
    }).map((t) => t.textContent),
    bars: [...at.querySelectorAll(".bin b")].filter((b) => b.offsetHeight > 1).length,
    fill: getComputedStyle(at.querySelector(".s > i")).backgroundColor,
  });
}, 300));
</script>"""


@pytest.mark.browser
@pytest.mark.parametrize("width", [390, 800, 1400])
def test_the_page_fits_and_runs_nothing_but_its_own(
    probed: Any, tmp_path: Path, width: int
) -> None:
    # Even text that was not escaped would stay a text: the page's policy forbids it to run.
    source = data_page(REPORT).replace("<main", f"<script>hacked = 2</script>{EVIL[9:]}<main")
    (tmp_path / "page.html").write_text(source, encoding="utf-8")
    found = probed(PROBE.replace("{width}", str(width)))
    assert found["errors"] == [] and found["cut"] == [] and found["hacked"] is None
    assert found["width"] == width and found["over"] <= 0 and found["tip"]
    assert found["shown"] and found["bars"] > 2 * len(EDGES)
    assert found["bin"].startswith("5 to 8 tokens\ntraining ")
    for told, some in zip(found["tokens"], [e for c in EXAMPLES.values() for e in c], strict=True):
        learned = [(k, p) for k, p in enumerate(some["pieces"]) if p[1] > 0]
        number, (text, weight, _) = learned[1]
        assert told.startswith(f"token {number} ") and f"weight {weight:g}" in told
        assert json.loads(told.splitlines()[1]) == text
    assert found["fill"] == "rgb(211, 228, 255)"


@pytest.mark.browser
def test_the_page_can_be_printed_to_an_image(chromium: Any, tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text(data_page(REPORT), encoding="utf-8")
    path = tmp_path / "page.png"
    arguments = [f"--screenshot={path}", "--window-size=1400,1000", "--virtual-time-budget=2000"]
    chromium(tmp_path / "profile", *arguments, f"file://{tmp_path}/page.html")
    assert struct.unpack(">II", path.read_bytes()[16:24]) == (1400, 1000)
    assert path.stat().st_size > 40_000  # a blank page of this size has 5 kB
