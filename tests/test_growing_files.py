"""Rows of a growing file: whole ones, each once, whatever a kill or a resumed run left."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from posttrain_dist.files import RowFollower, read_rows, write_atomic


def line(step: int, **values: Any) -> str:
    return json.dumps({"step": step, **values}) + "\n"


def append(path: Path, data: bytes) -> None:
    with path.open("ab") as stream:
        stream.write(data)


def test_rows_that_are_whole_are_read(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert read_rows(path) == []
    other = '{"loss": 1}\n[1]\n{"step": null}\nno JSON\n\n'
    path.write_bytes((line(1, a="\u2028") + other + line(2)).encode() + b'{"step": 3, "a": "\xe6')
    assert read_rows(path) == [{"step": 1, "a": "\u2028"}, {"step": 2}]
    path.write_text(line(4).strip())  # whole, but for its line end
    assert read_rows(path) == [{"step": 4}]


def test_each_row_comes_once_and_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    rows = RowFollower(path)
    assert rows.read() == []
    append(path, line(1).encode() + b'{"step": 2, "a": "\xc3')  # within a character
    assert rows.read() == [{"step": 1}]
    assert rows.read() == []
    append(path, b'\xa9"}\n' + line(3).encode())
    assert rows.read() == [{"step": 2, "a": "\u00e9"}, {"step": 3}]


def test_rows_of_an_earlier_start_are_skipped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    rows = RowFollower(path)
    rows.skip()  # of a file that is not there
    append(path, line(1).encode())
    assert rows.read() == [{"step": 1}]
    late = RowFollower(path)
    late.skip()
    append(path, line(2).encode())
    assert late.read() == [{"step": 2}]


def test_rows_that_a_resumed_run_cuts_come_again(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    append(path, "".join(map(line, range(5))).encode())
    rows = RowFollower(path)
    assert len(rows.read()) == 5
    write_atomic(path, line(0) + line(1))
    assert rows.read() == []  # they were read before
    append(path, line(2, again=True).encode())
    assert rows.read() == [{"step": 2, "again": True}]
