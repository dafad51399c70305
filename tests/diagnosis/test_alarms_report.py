"""Alarms as the report shows them."""

from __future__ import annotations

import json
from pathlib import Path

from posttrain_dist.diagnosis.alarms import Alarm, AlarmLog, Level
from posttrain_dist.report.run.alarm_section import MAX_ALARMS, alarms_of


def write(folder: Path, alarms: list[Alarm]) -> None:
    log = AlarmLog(folder / "logs" / "alarms.jsonl", 0)
    log.write(alarms)
    log.close()


def test_no_file_is_not_the_same_as_no_alarm(tmp_path: Path) -> None:
    assert alarms_of(tmp_path) is None
    write(tmp_path, [])
    assert alarms_of(tmp_path) == {"rows": [], "counts": {}, "hidden": 0}


def test_rows_by_step_and_counts_by_level(tmp_path: Path) -> None:
    write(
        tmp_path,
        [
            Alarm("low_loss", 1500, Level.info, "low", "stop", ""),
            Alarm("spike", 30, Level.warning, "high", "look", "maths"),
            Alarm("not_finite", 2000, Level.error, "NaN", "go back", ""),
            Alarm("stall", 40, Level.warning, "flat", "raise", ""),
        ],
    )
    found = alarms_of(tmp_path)
    assert found is not None
    assert [(row["step"], row["rule"], row["tone"]) for row in found["rows"]] == [
        ("30", "spike", "warn"),
        ("40", "stall", "warn"),
        ("1,500", "low_loss", ""),
        ("2,000", "not_finite", "bad"),
    ]
    assert list(found["counts"].items()) == [("error", 1), ("warning", 2), ("info", 1)]
    assert found["rows"][0]["subject"] == "maths"
    assert found["rows"][0]["fix"] == "look"


def test_torn_and_foreign_lines_and_very_many(tmp_path: Path) -> None:
    write(tmp_path, [Alarm("spike", i, Level.warning, "m", "f") for i in range(MAX_ALARMS + 7)])
    with (tmp_path / "logs" / "alarms.jsonl").open("a") as stream:
        stream.write(json.dumps({"step": 3, "rule": "other"}) + "\n[1]\n" + '{"step": 4, "ru')
    found = alarms_of(tmp_path)
    assert found is not None
    assert len(found["rows"]) == MAX_ALARMS
    assert found["hidden"] == 8
    assert {"step": "3", "level": "", "tone": "", "rule": "other"}.items() <= {
        key: value for row in found["rows"] if row["rule"] == "other" for key, value in row.items()
    }.items()
