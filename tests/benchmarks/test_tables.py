"""The tables of the docs: made from rows, and the committed pages are what they give."""

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def results(tmp_path):
    """Two runs of two arms; the last run has an arm that could not run."""
    facts = {"machine": "m", "versions": {"torch": "1", "trl": "-"}, "command": "c"}

    def row(run: str, arm: str, **more: object) -> dict:
        return {"date": f"2026-01-0{run}T00:00:00", "run": run, **facts, "arm": arm, **more}

    rows = [
        row("1", "ours", n=8, p50_s=9.0),
        row("1", "peer", n=8, p50_s=9.0),
        row("2", "ours", n=8, p50_s=0.0123),
        row("2", "peer", n=8, skipped="it is not here"),
        row("3", "ours", n=9, p50_s=0.5, times=3.0),
    ]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return tmp_path


def test_the_committed_page_is_what_the_generator_makes_of_the_committed_rows():
    from tables import PAGES, TABLES, fill

    for path in PAGES:
        page = path.read_text()
        assert fill(page, TABLES) == page, path


def test_every_table_has_its_place():
    from tables import MARKS, PAGES, TABLES

    marks = [m[2] for page in PAGES for m in MARKS.finditer(page.read_text())]
    assert sorted(marks) == sorted(TABLES)


def test_a_table_shows_the_last_run_that_has_what_it_asks_for(results):
    from cells import number, text
    from tables import Table, fill

    columns = {"arm": text("arm"), "ms": number("p50_s", 1, 1e3), "x": number("none")}
    table = Table(source="x", columns=columns, where={"n": 8})
    page = fill("a\n<!-- table: t -->\nold\n<!-- /table -->\nb\n", {"t": table}, results)
    assert page.splitlines() == [
        "a",
        "<!-- table: t -->",
        "",
        "| arm | ms | x |",
        "| --- | ---: | ---: |",
        "| ours | 12.3 | - |",
        "",
        "Not run: peer: it is not here.",
        "",
        "m; torch 1; 2026-01-02T00:00Z; `c`",
        "",
        "<!-- /table -->",
        "b",
    ]


def test_differences_are_summed_up(tmp_path):
    from cells import text
    from tables import Differences

    facts = {"date": "2026-01-01T00:00:00", "machine": "m", "versions": {}, "command": "c"}
    errors = {"a": 0.01, "b": -0.004, "c": 0.02}
    rows = [{**facts, "run": name, "arm": name, "error": error} for name, error in errors.items()]
    rows.insert(0, {**facts, "run": "old", "arm": "a", "error": 9.0})  # another of a stands below
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    table = Differences(source="x", columns={"arm": text("arm")}, per=("arm",))
    last = "3 runs: median difference 1.00 %, 95th percentile 2.00 %, from -0.40 % to +2.00 %."
    assert table.text(tmp_path).splitlines()[-1] == last


def test_groups_are_each_of_their_own_last_run(results):
    from tables import Table

    table = Table(source="x", columns={}, per=("n",))
    assert [(r["run"], r["n"]) for r in table.rows(results)] == [("2", 8), ("2", 8), ("3", 9)]


def test_a_page_that_was_filled_stays_as_it_is(results):
    from cells import text
    from tables import Table, fill

    tables = {"t": Table(source="x", columns={"arm": text("arm")})}
    once = fill("<!-- table: t -->\n<!-- /table -->\n", tables, results)
    assert fill(once, tables, results) == once


def test_a_mark_without_a_table_is_an_error(results):
    from tables import fill

    with pytest.raises(KeyError, match="nothing"):
        fill("<!-- table: nothing -->\n<!-- /table -->", {}, results)


@pytest.mark.parametrize(
    ("sense", "limit", "where", "expected"),
    [
        ("at least", 2.5, {"n": 9}, ["g", "at least 2.5", "3.00", "yes"]),
        ("at least", 3.5, {"n": 9}, ["g", "at least 3.5", "3.00", "**no**"]),
        ("at most", 3.5, {"n": 9}, ["g", "at most 3.5", "3.00", "yes"]),
        ("at most", 2.5, {"n": 9}, ["g", "at most 2.5", "3.00", "**no**"]),
        ("at most", 2.5, {"n": 7}, ["g", "at most 2.5", "not measured", ""]),
        ("at most", 2.5, {"n": 8, "arm": "peer"}, ["g", "at most 2.5", "not measured", ""]),
    ],
)
def test_a_goal_says_whether_it_is_met(results, sense, limit, where, expected):
    from tables import Goal

    assert Goal("g", sense, limit, "x", "times", where).cells(results) == expected
    own = Goal("g", sense, limit, "x", lambda row: row.get("times"), where)
    assert own.cells(results) == expected
