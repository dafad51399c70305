"""Answers on the page and the terminal: side by side, named, with the mean of their lengths."""

from __future__ import annotations

from typing import Any

import pytest

from posttrain_dist.report.data.answer_figures import (
    answer_warnings,
    comparison_rows,
    names_of_answers,
    of_sample,
)
from posttrain_dist.report.data.data_page import data_page
from posttrain_dist.report.data.data_text import data_text


def answer(value: float, role: int = 0, text: str = "x", **rest: Any) -> dict[str, Any]:
    pieces = [[text, 1.0, False], ["<|end|>", 1.0, True]]
    return {"role": role, "value": value, "tokens": 2, "supervised": 2, "pieces": pieces, **rest}


@pytest.mark.parametrize(
    ("answers", "names"),
    [
        ([answer(1.0, margin=0.5), answer(0.0)], ["chosen by 0.5", "rejected"]),
        ([answer(1.0), answer(0.0, 1)], ["desirable", "answer to another prompt"]),
        ([answer(0.0, truncated=True)], ["undesirable, cut"]),
        ([answer(2.0), answer(1.0), answer(0.0)], ["worth 2", "worth 1", "worth 0"]),
        ([answer(0.25), answer(-1.0)], ["worth 0.25", "worth -1"]),
    ],
)
def test_answers_are_named_by_what_they_are_worth(
    answers: list[dict[str, Any]], names: list[str]
) -> None:
    assert names_of_answers(answers) == names


def counts(better: int, worse: int, number: int = 4) -> dict[str, Any]:
    return {
        "rows": number,
        "samples": 3 * number,
        "supervised": better + worse,
        "tokens": better + worse,
        "comparisons": number,
        "better": number,
        "better_tokens": better,
        "worse": number,
        "worse_tokens": worse,
    }


REPORT: dict[str, Any] = {
    "name": "answers",
    "channels": ["even", "long"],
    "splits": {"train": {"even": counts(40, 44), "long": counts(90, 60)}, "eval": {}},
    "examples": {
        "even": [
            {
                "where": "rows.jsonl:1",
                "split": "train",
                "tokens": 1,
                "supervised": 4,
                "pieces": [["ask", 0.0, False]],
                "answers": [answer(1.0, text="good"), answer(0.0, text="bad")],
            }
        ]
    },
    "batch": {
        "tokens": 5,
        "samples": 3,
        "pieces": [
            ["ask", 0.0, False, 0],
            ["good", 1.0, False, 1],
            ["bad", 1.0, False, 2],
        ],
        "units": [
            {"follows": None, "role": -1, "value": 0.0},
            {"follows": 0, "role": 0, "value": 1.0},
            {"follows": 0, "role": 1, "value": 0.0},
        ],
    },
}


def test_lengths_that_differ_are_told() -> None:
    even, long = comparison_rows(REPORT, "train")
    assert (even["better"], even["worse"], even["ratio"], even["biased"]) == (
        *("10.0", "11.0", "0.91"),
        False,
    )
    assert (long["ratio"], long["biased"]) == ("1.50", True)
    (line,) = answer_warnings(REPORT)
    assert line.startswith("long: better answers have 22.5 tokens on average, the others 15.0")
    assert comparison_rows({"splits": {"train": {"a": {"rows": 1}}}}, "train") == []


def test_each_sample_of_a_pack_says_what_it_is() -> None:
    units = REPORT["batch"]["units"]
    said = [of_sample(units, sample) for sample in range(3)]
    assert said == ["prompt", "answer to sample 0, worth 1", "answer of another row to sample 0"]
    assert of_sample([], 0) == "" == of_sample([{"follows": None}], 0)


def test_the_page_has_both_answers_in_one_row_of_the_grid_and_marks_the_better_one() -> None:
    page = data_page(REPORT)
    _, grid = page.split('<div class="answers">')
    grid = grid.split("</article>")[0]
    better, worse = grid.split('<div class="answer')[1:]
    assert better.startswith(' better"') and "<b>chosen</b>" in better and "good" in better
    assert worse.startswith('"') and "<b>rejected</b>" in worse and "bad" in worse
    assert better.count('class="r s"') == 1  # what is compared is marked
    assert "answer to sample 0, worth 1" in page and "attends to it and to itself alone" in page
    assert "22.5" in page and 'class="num biased">1.50' in page


def test_the_terminal_has_them_below_each_other() -> None:
    text = data_text(REPORT, 100, color=False)
    chosen, rejected = text.index("  chosen · 2 tokens"), text.index("  rejected · 2 tokens")
    assert text.index("ask") < chosen < text.index("⟦good<|end|>⟧") < rejected
    assert "length alone may" in text


@pytest.mark.parametrize(
    ("better", "worse", "line"),
    [
        (4, 0, ["every label is true: without undesirable answers there is nothing to tell apart"]),
        (0, 4, ["every label is false: without desirable answers there is nothing to tell apart"]),
        (3, 1, []),
    ],
)
def test_labels_of_one_kind_are_told(better: int, worse: int, line: list[str]) -> None:
    tokens = {"better_tokens": 5 * better, "worse_tokens": 5 * worse}
    count = {**counts(10, 10), "comparisons": 0, "better": better, "worse": worse, **tokens}
    assert answer_warnings({"splits": {"train": {"a": count}}}) == line
    assert answer_warnings({"splits": {"train": {"a": {"rows": 3}}}}) == []  # of SFT
