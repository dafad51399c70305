"""Load states as a resume does, past the look at their digests: rank world port run_folder state...

Prints what each load came to.
"""

import os
import sys
from pathlib import Path

from posttrain_dist import dist
from posttrain_dist.build import build_policy, frozen_dtype, make_engine, open_prepared
from posttrain_dist.config import RunConfig
from posttrain_dist.errors import CheckpointError

os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] = "1"  # as a user may have it
run_folder = Path(sys.argv[4])
config = RunConfig.from_yaml((run_folder / "config.yaml").read_text())
process = dist.Process()
dist.start(process)
dtype = frozen_dtype(config, run_folder)
engine = make_engine(config, process, dtype)
build_policy(config, engine, dtype, open_prepared(run_folder / "prepared").channels)
for state in map(Path, sys.argv[5:]):
    try:
        engine.load_state(state)
        print("LOADED", state)
    except CheckpointError as error:
        print("REFUSED", state, error.what)
dist.stop()
