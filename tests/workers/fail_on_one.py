"""Save a checkpoint while one rank fails: rank world port folder. Prints what each rank got."""

import sys
from pathlib import Path

from posttrain_dist import dist
from posttrain_dist.checkpoint import store
from posttrain_dist.errors import CheckpointError

rank, world, port = (int(argument) for argument in sys.argv[1:4])
run_folder = Path(sys.argv[4])
dist.start(dist.Process(rank=rank, world=world, local_rank=rank, master_port=port))


def write(step: int, failing: int):
    def write_state(folder: Path) -> None:
        if rank == failing:
            raise RuntimeError("PytorchStreamWriter failed writing file")
        (folder / f"rank-{rank}").write_text(str(step))

    manifest = store.Manifest(step=step, layout={}, channels=[])
    return store.save(run_folder, manifest, write_state, keep=1)


write(1, failing=-1)
try:
    write(2, failing=1)
except CheckpointError as error:
    print(f"SAID {error}")
print("AGREED", dist.from_main(lambda: f"rank {rank} looked"))
write(3, failing=-1)
