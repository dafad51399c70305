"""What a data report is made of: its verdict, its totals, the places of its bars, its marks."""

import math

import pytest

from posttrain_dist.report.data.data_figures import (
    cards_of,
    channel_table,
    checks_of,
    source_rows,
    verdict_of,
)
from posttrain_dist.report.data.histogram import half_length, panels_of, sparkline
from posttrain_dist.report.data.token_runs import clean, runs


def check(name: str, level: str, failed: int) -> dict:
    return {"name": name, "level": level, "checked": 50, "failed": failed}


PASSED = [check("double_bos", "error", 0), check("prefix", "warning", 0)]
FAILED = [check("a", "warning", 2), check("b", "error", 0), check("c", "error", 1)]
STARVED = {"train": {"maths": {"rows": 9, "samples": 0, "supervised": 0}}}


@pytest.mark.parametrize(
    ("change", "tone", "title", "points"),
    [
        ({}, "good", "All 2 checks passed", []),
        ({"checks": PASSED[:1]}, "good", "The one check passed", []),
        ({"checks": []}, "warn", "No check was made", []),
        (
            {"near_leaks": 1},
            "warn",
            "Fit to train on, with 1 warning",
            ["1 held-out row has a near duplicate in training"],
        ),
        (
            {"files": [{"rejected": 1200}, {"rejected": 34}], "near_leaks": 2},
            "warn",
            "Fit to train on, with 2 warnings",
            [
                "1,234 rows were rejected and left out",
                "2 held-out rows have a near duplicate in training",
            ],
        ),
        (
            {"checks": FAILED},
            "bad",
            "Training does not start on this data: 1 error",
            ["c: 1 of 50 fail", "a: 2 of 50 fail"],
        ),
        (
            {"checks": FAILED[2:], "settings": {"strict": False}},
            "bad",
            "This data has faults: 1 error",
            ["c: 1 of 50 fail"],
        ),
        (
            {"splits": STARVED},
            "bad",
            "Training does not start on this data: 2 errors",
            ["there is no training sample", "channel maths has no supervised token"],
        ),
    ],
)
def test_the_verdict(change: dict, tone: str, title: str, points: list[str]) -> None:
    verdict = verdict_of({"checks": PASSED} | change)
    assert (verdict.tone, verdict.title) == (tone, title)
    assert [point.text for point in verdict.points] == points


def test_checks_come_in_the_order_of_their_weight() -> None:
    assert [c["name"] for c in checks_of({"checks": FAILED})] == ["c", "a", "b"]


def test_totals_are_sums_over_channels_and_splits() -> None:
    def counts(k: int) -> dict:
        return {
            "rows": 1000 + k,
            "samples": 900 + k,
            "tokens": 8000 * k,
            "supervised": 2000 * k,
            "truncated": k,
            "dropped": 2 * k,
            "duplicates": 3 * k,
            "near_duplicates": 5 * k,
        }

    splits = {"train": {"a": counts(1), "b": counts(10)}, "eval": {"a": counts(100)}}
    report = {"channels": ["b", "a"], "splits": splits, "settings": {"max_length": 4096}}
    cards = {card.label: (card.value, card.sub) for card in cards_of(report)}
    assert cards["Rows"] == ("3,111", "2,011 training · 1,100 held-out")
    assert cards["Samples"] == ("2,811", "1,811 training · 1,000 held-out")
    assert cards["Tokens"] == ("888,000", "88,000 training · 800,000 held-out")
    assert cards["Supervised"] == ("25.0%", "22,000 training · 200,000 held-out")
    assert cards["Truncated"] == ("111", "rows above 4,096 tokens; 222 dropped")
    assert cards["Duplicates"] == ("333", "exact, and 555 near")
    rows = channel_table(report, "train")
    assert [row["name"] for row in rows] == ["b", "a", "all channels"]
    sums = [text for _, text in rows[2]["cells"]]
    assert sums == ["2,011", "1,811", "88,000", "22,000", "11", "22", "33", "55"]
    assert [row["name"] for row in channel_table(report, "eval")] == ["a"]  # its own sum


def test_a_starved_channel_stands_out() -> None:
    (row,) = channel_table({"splits": STARVED}, "train")
    assert row["starved"] and row["share"] == "\u2013"
    assert dict(row["cells"])["tokens"] == "\u2013"  # not told, which is not 0


def test_shares_of_sources_are_drawn_on_one_scale() -> None:
    sources = {
        "a": {"asked": 0.2, "rows_share": 0.25, "token_share": 0.4, "passes": 2.5},
        "b": {"asked": 0.8, "rows_share": None, "token_share": 0.6},
    }
    a, b = source_rows({"sources": sources})
    assert [share["text"] for share in a["shares"]] == ["20.0%", "25.0%", "40.0%"]
    assert [share["width"] for share in a["shares"]] == [25.0, 31.2, 50.0]
    assert [share["width"] for share in b["shares"]] == [100.0, 0.0, 75.0]
    assert (a["passes"], b["passes"], b["shares"][1]["text"]) == ("2.5", "\u2013", "\u2013")


def test_bins_stand_where_their_lengths_are() -> None:
    lengths = [[16, 3], [128, 5], [256, 0], [512, 2]]  # 32 and 64 were left out as empty
    splits = {"train": {"a": {"lengths": lengths}}, "eval": {"a": {"lengths": [[128, 4]]}}}
    (panel,) = panels_of({"splits": splits, "settings": {"max_length": 256}}, ["a"])
    low, high = 8, 512 * 1.04  # the first bin is an octave

    def place(tokens: float) -> float:
        return 100 * math.log(tokens / low) / math.log(high / low)

    spans = [(8, 16), (64, 128), (256, 512)]
    for bar, (lower, upper) in zip(panel.bars, spans, strict=True):
        assert bar.left == pytest.approx(place(lower), abs=0.01)
        assert bar.left + bar.width == pytest.approx(place(upper), abs=0.01)
    assert panel.limit == pytest.approx(place(256), abs=0.01)
    assert [bar.over for bar in panel.bars] == [False, False, True]
    # Shares: training 3, 5, 2 of 10, held-out 4 of 4, which is the highest.
    heights = [bar.train for bar in panel.bars]
    assert [h / panel.bars[1].heldout for h in heights] == pytest.approx([0.3, 0.5, 0.2], abs=1e-3)
    assert [bar.heldout is None for bar in panel.bars] == [True, False, True]
    for at, text in panel.x_ticks:
        assert at == pytest.approx(place(int(text.replace(",", ""))), abs=0.01)
    assert panel.note == "half ≤ 128 · all ≤ 512"
    assert half_length(lengths) == 128 and half_length([[4, 0]]) is None
    assert sparkline(lengths) == "▅█ ▄" and sparkline([[8, 0]]) == ""


def test_no_more_panels_than_anyone_looks_at() -> None:
    names = [f"c{k:02d}" for k in range(40)]
    splits = {"train": {name: {"lengths": [[8, k]]} for k, name in enumerate(names)}}
    assert [p.title for p in panels_of({"splits": splits}, names)] == names[16:]  # most samples


def marks(pieces: list[list]) -> list[tuple[float, list[list[tuple[str, str]]]]]:
    return [
        (run.weight, [[(mark.kind, mark.text) for mark in token.marks] for token in run.tokens])
        for run in runs(pieces)
    ]


def test_tokens_are_grouped_by_weight() -> None:
    pieces = [["a", 0, False], ["b", 0.5, False], ["c", 0.5, True], ["d", 1, False]]
    assert marks(pieces) == [
        (0, [[("", "a")]]),
        (0.5, [[("", "b")], [("", "c")]]),
        (1, [[("", "d")]]),
    ]


def test_whitespace_that_matters_is_marked() -> None:
    space = ("space", " ")
    # Within words it does not; at the edge of what is trained on, and twice, it does.
    pieces = [["a b", 0, False], [" c ", 0, False], [" d", 1, False], [" e  f", 1, False]]
    (_, masked), (_, learned) = marks(pieces)
    assert masked == [[("", "a b")], [("", " c"), space]]
    assert learned == [[space, ("", "d")], [("", " e"), space, space, ("", "f")]]
    pieces = [["x ", 0, False], ["<s>", 0, True], ["y ", 0, False], ["\n\tz", 0, False]]
    assert marks(pieces)[0][1] == [
        [("", "x"), space],
        [("", "<s>")],
        [("", "y"), space],
        [("newline", "\n"), ("tab", "\t"), ("", "z")],
    ]


def test_characters_without_a_glyph_are_marked_and_joiners_are_not() -> None:
    family = "\U0001f468\u200d\U0001f469"
    text = f"a\u200b{family}\u00ad\r\ufeffé\u0301日"
    ((_, (found,)),) = marks([[text, 1, False]])
    assert "".join(part for _, part in found) == text
    hidden = [part for kind, part in found if kind == "hidden"]
    assert hidden == ["\u200b", "\u00ad", "\r", "\ufeff"]
    assert ("", family) in found and ("", "é\u0301日") in found


def test_clean_reaches_every_text() -> None:
    value = {"a\x1b": ["\ud800", ("b\u202e", 3, None)], "c": {"d": "e\u00a0\n"}}
    assert clean(value) == {
        "a<U+001B>": ["<U+D800>", ["b<U+202E>", 3, None]],
        "c": {"d": "e<U+00A0>\n"},
    }
