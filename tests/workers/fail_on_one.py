"""Save a checkpoint while one rank fails: rank world port folder. Prints what each rank got."""

import sys
from pathlib import Path

from posttrain_dist import dist
from posttrain_dist.checkpoint import store
from posttrain_dist.checkpoint.manifest import Layout, Manifest, Recipe
from posttrain_dist.errors import CheckpointError
from posttrain_dist.files import DigestWriter

rank, world, port = (int(argument) for argument in sys.argv[1:4])
run_folder = Path(sys.argv[4])
dist.start(dist.Process(rank=rank, world=world, local_rank=rank, master_port=port))


def write(step: int, failing: int):
    def write_state(folder: Path):
        if rank == failing:
            raise RuntimeError("PytorchStreamWriter failed writing file")
        with DigestWriter(folder / f"rank-{rank}") as file:
            file.write(f"{rank} {step}".encode())
        return {f"rank-{rank}": file.digest}

    manifest = Manifest(step=step, recipe=Recipe([]), layout=Layout("x", world, "float32"))
    return store.save(run_folder, manifest, write_state, keep=1)


def attempt(work) -> None:
    try:
        work()
    except (CheckpointError, RuntimeError) as error:
        print(f"SAID {type(error).__name__} {error}")


write(1, failing=-1)
attempt(lambda: write(2, failing=1))
print("AGREED", dist.from_main(lambda: f"rank {rank} looked"))
third = write(3, failing=-1)
print("FOUND", repr(store.damage_of(third, lambda path: None)))
dist.barrier()
if rank == 0:
    (third / "state" / "rank-1").write_text("1 4")  # as many bytes
dist.barrier()
print("FOUND", store.damage_of(third, lambda path: None))
