"""docs/planning.md names what there is: presets of hardware, flags of the verb, the fallbacks."""

from __future__ import annotations

import re
from pathlib import Path

from posttrain_launch.compose.command_line import OWN_FLAGS

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "planning.md").read_text(encoding="utf-8")


def test_it_names_every_preset_of_hardware():
    rows = re.findall(r"^\| ((?:`\w+`(?:, )?)+) \|", PAGE.split("## Hardware")[1], re.MULTILINE)
    named = {name for row in rows for name in re.findall(r"\w+", row)}
    assert named == {file.stem for file in (ROOT / "conf" / "hardware").glob("*.yaml")}


def test_it_names_every_flag_of_the_verb():
    assert set(re.findall(r"`(--\w+)", PAGE)) - {"--force"} == set(OWN_FLAGS["plan"])
