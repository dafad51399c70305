"""The calibration of a reward model on the page: dots where the numbers say."""

from __future__ import annotations

import json

import pytest

from posttrain_dist.report.run.calibration import calibration_of

BINS = [
    {"confidence": 0.5, "right": 0.5, "count": 4.0},
    {"confidence": 1.0, "right": 0.75, "count": 1.0},
]


def test_dots_lie_where_the_axes_say_and_the_error_is_weighed(tmp_path):
    figures = {"step": 7, "calibration": {"": BINS, "a": BINS, "b": BINS[:1]}}
    (tmp_path / "figures.json").write_text(json.dumps(figures))
    found = calibration_of(tmp_path)
    assert found.step == 7 and [p.title for p in found.panels] == ["All channels", "a", "b"]
    panel = found.panels[0]
    assert panel.note == "error 5.0%, right 55.0%"  # (4 x 0 + 1 x 0.25) / 5
    columns = {label: x for x, label in found.columns}
    rows = {label: y for y, label in found.rows}
    assert (panel.dots[0].x, panel.dots[0].y) == (columns["50%"], rows["50%"])
    assert (panel.dots[1].x, panel.dots[1].y) == (columns["100%"], rows["75%"])
    assert panel.dots[0].radius == pytest.approx(2 * panel.dots[1].radius)  # four times the area
    assert found.diagonal == (columns["50%"], rows["50%"], columns["100%"], rows["100%"])


@pytest.mark.parametrize("text", ["", "[]", '{"step": 1}', '{"step": 1, "calibration": {"": 3}}'])
def test_a_torn_file_draws_nothing(tmp_path, text):
    (tmp_path / "figures.json").write_text(text)
    assert calibration_of(tmp_path) is None


def test_one_channel_is_not_drawn_twice(tmp_path):
    figures = {"step": 7, "calibration": {"": BINS, "a": BINS}}
    (tmp_path / "figures.json").write_text(json.dumps(figures))
    assert [panel.title for panel in calibration_of(tmp_path).panels] == ["All channels"]
