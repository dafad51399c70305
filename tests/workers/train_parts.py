"""As train_runs.py, with the tuning `part` of the tests: rank world port folder..."""

import sys
from pathlib import Path

from part_tuning import register

register()
sys.argv[0] = str(Path(__file__).with_name("train_runs.py"))
exec(Path(sys.argv[0]).read_text())
