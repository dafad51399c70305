"""Formats of numbers, and tables of the terminal."""

from __future__ import annotations

import pytest

from posttrain_dist.report import numbers
from posttrain_dist.report.text_tables import text_table


@pytest.mark.parametrize(
    ("format_number", "texts"),
    [
        (numbers.rounded, {999: "999", 1e3: "1.0k", 5123: "5.1k", 2.25e6: "2.2M", 3e9: "3.0G"}),
        # What rounds up to a thousand has the next larger unit.
        (numbers.rounded, {999.4: "999", 999.9: "1.0k", 999_400: "999.4k", 999_999: "1.0M"}),
        (numbers.clock, {-3: "0:00", 0: "0:00", 59.6: "1:00", 3600 + 62: "1:01:02"}),
        (numbers.duration, {9.25: "9.2 s", 59.97: "60.0 s", 61: "1 min 1 s", 7384: "2 h 3 min"}),
        (numbers.whole, {None: "\N{EN DASH}", 0: "0", 1234567: "1,234,567"}),
        (numbers.general, {0.123456: "0.1235", 9999.4: "9999", 12345.6: "12,346"}),
        (numbers.power_of_two, {512: "512", 8192: "8,192", 16384: "16k", 2**21: "2,048k"}),
        (numbers.loss, {2.34567: "2.346", 0.0012345: "0.0012"}),
        (numbers.loss_of_log, {None: "-", 2.34567: "2.3457"}),
        (numbers.share, {None: "\N{EN DASH}", 0.12345: "12.3%"}),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_number_as_text(format_number, texts):
    assert {value: format_number(value) for value in texts} == texts


def test_parts_of_a_whole():
    assert numbers.share_of(1, 8) == "12.5%" and numbers.share_of(1, 0) == "\N{EN DASH}"
    assert numbers.bar_width(1, 3) == 33.3 and numbers.bar_width(1, 0) == 0
    assert [numbers.plural(n, "check") for n in (0, 1, 1200)] == [
        "0 checks",
        "1 check",
        "1,200 checks",
    ]


def test_a_table_keeps_names_left_and_numbers_right():
    long = "[bold]no markup[/bold] :smile: " + "x" * 300  # neither markup, nor folded
    rows = [("copy", "train", "1,234", "5"), (long, "held-out", "7", "12")]
    lines = text_table(("channel", "split", "rows", "tokens"), rows, names=2).splitlines()
    width = len(long)
    assert lines == [
        f"{'channel':<{width}}  split      rows  tokens",
        "-" * (width + 2 + 8 + 2 + 5 + 2 + 6),
        f"{'copy':<{width}}  train     1,234       5",
        f"{long}  held-out      7      12",
    ]


def test_a_table_counts_the_columns_of_wide_characters():
    lines = text_table(("name", "n"), [("\u65e5\u672c\u8a9e", "1"), ("abcdefg", "22")]).splitlines()
    # Three characters that fill six columns.
    assert lines[2:] == ["\u65e5\u672c\u8a9e    1", "abcdefg  22"]
