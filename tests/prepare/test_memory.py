"""What the data report of a million rows needs: bounded memory, and nothing of torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "workers" / "prepare_million.py"


@pytest.mark.slow
def test_a_million_rows_are_prepared_and_reported_in_200_megabytes(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), str(tmp_path), "1000000"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    has_torch, peak_mib = done.stdout.split()[-2:]
    assert has_torch == "False"
    assert int(peak_mib) * 1.048576 < 200
