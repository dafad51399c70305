"""`train_runs.py`, where memory that nobody has written to holds NaN."""

import runpy
from pathlib import Path

import torch

# Fills what `torch.empty` returns.
torch.use_deterministic_algorithms(True, warn_only=True)
runpy.run_path(str(Path(__file__).parent / "train_runs.py"), run_name="__main__")
