"""Right-to-left rows in the data report: a token lies in one place, and text reads as it should."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from posttrain_dist.report.data.data_page import data_page
from posttrain_dist.report.data.token_runs import reads_right_to_left

HEBREW = ["של", "ום", " עו", "לם", ", 12", "3 it", "ems", " של", "ום"]
ARABIC = ["مر", "حبا", " بال", "عالم", " 42"]
LATIN = ["the ", "old ", "fox"]


def special(text: str) -> list[Any]:
    return [text, 0, True]


PIECES = [
    special("<|user|>"),
    *([text, 0, False] for text in HEBREW),
    special("<|end|>"),
    *([text, 1, False] for text in ARABIC),
    special("<|end|>"),
    *([text, 1, False] for text in LATIN),
]
ROW = {"where": "r.jsonl:1", "split": "train", "tokens": len(PIECES), "supervised": 8}
REPORT = {"name": "rtl", "examples": {"rtl": [{**ROW, "pieces": PIECES}]}}

PROBE = """<iframe style="border: 0; width: 1200px; height: 900px" src="page.html"></iframe><script>
addEventListener("load", () => setTimeout(() => {
  const at = frames[0].document;
  at.querySelectorAll("details").forEach((d) => { d.open = true; });
  document.title = JSON.stringify([...at.querySelectorAll(".tokens i")].map((i) => {
    const boxes = [...i.getClientRects()], box = i.getBoundingClientRect();
    const point = {clientX: box.x + 2, clientY: box.y + 2, bubbles: true};
    i.dispatchEvent(new frames[0].PointerEvent("pointermove", point));
    // The boxes of its parts, which may run in both directions, fill its place.
    const filled = boxes.reduce((sum, each) => sum + each.width, 0);
    return [filled - box.width, box.x, box.y, box.width, at.getElementById("tip").innerText];
  }));
}, 300));
</script>"""


@pytest.mark.browser
def test_every_token_is_whole_and_they_run_as_the_text_reads(probed: Any, tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text(data_page(REPORT), encoding="utf-8")
    boxes = probed(PROBE)
    assert [gap for gap, *_ in boxes] == pytest.approx([0] * len(PIECES), abs=1)  # one place each
    assert len({round(y / 8) for _, _, y, *_ in boxes}) == 1  # all on one line
    first, last = 1, 1 + len(HEBREW)
    for begin, end, sign in ((first, last, -1), (last + 1, last + 1 + len(ARABIC), -1)):
        places = [sign * x for _, x, *_ in boxes[begin:end]]
        assert places == sorted(places)  # from right to left
        # Side by side: a token ends where the one before it begins.
        for (_, x, _, _, _), (_, left, _, width, _) in zip(
            boxes[begin : end - 1], boxes[begin + 1 : end], strict=True
        ):
            assert left + width == pytest.approx(x, abs=1)
    latin = [x for _, x, *_ in boxes[-len(LATIN) :]]
    assert latin == sorted(latin)
    for number, ((*_, told), (text, weight, _)) in enumerate(zip(boxes, PIECES, strict=True)):
        assert told.startswith(f"token {number} ")
        assert ("weight 1" in told) is (weight == 1)
        assert json.loads(told.splitlines()[1]) == text


@pytest.mark.parametrize(
    ("text", "is_so"),
    [
        ("שלום world", True),
        ("42, مرحبا", True),
        ("hello שלום", False),
        ("12 + 3", False),
        ("", False),
        ("数据", False),
        ("\u202eabc", False),  # an override is no letter
    ],
)
def test_the_first_letter_decides(text: str, is_so: bool) -> None:
    assert reads_right_to_left(text) is is_so
