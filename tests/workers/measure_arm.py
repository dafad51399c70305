"""One rank of an arm of benchmarks/plan_truth.py: rank world port arm folder."""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import plan_truth

rank, _, port = (int(argument) for argument in sys.argv[1:4])
arm = plan_truth.arms.ARMS[sys.argv[4]]
print("TOLD " + json.dumps(plan_truth.measure_rank(arm, Path(sys.argv[5]), rank, port)))
