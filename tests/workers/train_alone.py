"""Train frozen runs, one after the other, and start no ranks: rank world port folder..."""

import sys
from pathlib import Path

from posttrain_dist.config import RunConfig
from posttrain_dist.train import train

for folder in map(Path, sys.argv[4:]):
    train(RunConfig.from_yaml((folder / "config.yaml").read_text()), folder)
