"""Train several frozen runs, one after the other, as one rank: rank world port folder..."""

import sys
from pathlib import Path

from posttrain_dist import dist
from posttrain_dist.config import RunConfig
from posttrain_dist.train import train

rank, world, port = (int(argument) for argument in sys.argv[1:4])
process = dist.Process(rank=rank, world=world, local_rank=rank, master_port=port)
dist.start(process)
for folder in map(Path, sys.argv[4:]):
    config = RunConfig.from_yaml((folder / "config.yaml").read_text())
    train(config, folder, process)
dist.stop()
