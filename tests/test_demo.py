"""The demo, shortened: one command, two Ray workers, ZeRO-3, and everything that it promises.

On the way one of its workers is killed: it is replaced, and the numbers are those without Ray.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sysconfig
from pathlib import Path

import pytest
from ray_runs import (
    actors_of,
    is_worker,
    listening,
    losses,
    processes_of,
    ray_folders,
    wait_until,
    worker_groups_started,
)

from posttrain_dist.files import read_rows

POSTTRAIN = Path(sysconfig.get_path("scripts")) / "posttrain"
SHORT = ["train.steps=6", "train.eval_every=3", "train.save_every=2"]
SHORT += ["eval.generate_rows=2", "eval.samples=3"]


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> tuple[Path, str]:
    """(run folder, what was printed) of the demo with a worker killed after its first save."""
    root = tmp_path_factory.mktemp("demo")
    for name in ("ray", "torch", "wandb", "tokenizers", "numpy"):  # what users call their scripts
        (root / f"{name}.py").write_text("raise SystemExit('a file of the user was imported')")
    command = [str(POSTTRAIN), "train", "+experiment=demo", *SHORT]
    with (root / "said").open("w") as said, (root / "errors").open("w") as errors:
        driver = subprocess.Popen(command, cwd=root, stdout=said, stderr=errors)
    try:
        saved = "outputs/demo/*/checkpoints/step-*/MANIFEST.json"
        wait_until(lambda: list(root.glob(saved)) or driver.poll() is not None, 240)
        processes = processes_of(root)
        seen = {"listening": listening(processes)}
        seen["modes"] = [(str(f), f.parent.stat().st_mode & 0o777) for f in ray_folders(processes)]
        (root / "seen.json").write_text(json.dumps(seen))
        workers = [pid for pid in processes if is_worker(pid)]
        if len(workers) == 2:
            os.kill(max(workers), signal.SIGKILL)
        code = driver.wait(timeout=240)
    finally:
        driver.kill()
    text = (root / "said").read_text()
    assert code == 0, text[-3000:] + (root / "errors").read_text()[-3000:]
    assert len(workers) == 2
    assert processes_of(root) == []
    (folder,) = (root / "outputs" / "demo").iterdir()
    return folder, text


@pytest.mark.ray
def test_one_command_trains_and_tells(demo):
    import transformers

    from posttrain_dist.data.embedded import CHANNELS, FIXED_CHANNELS

    folder, said = demo
    assert json.loads((folder / "FINISHED").read_text()) == {"reason": "completed", "step": 6}

    rows = read_rows(folder / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(7))
    evaluated = [row for row in rows if "eval/loss" in row]
    assert [row["step"] for row in evaluated] == [0, 3, 6]
    assert evaluated[-1]["eval/loss"] < evaluated[0]["eval/loss"] - 0.1
    for channel in CHANNELS:
        assert f"eval_channel_loss/{channel}" in evaluated[0]

    # It was ZeRO-3 on two ranks, truly sharded: each rank saved its part of the parameters.
    *_, checkpoint = sorted((folder / "checkpoints").glob("step-*"))
    manifest = json.loads((checkpoint / "MANIFEST.json").read_text())
    assert manifest["layout"]["engine"] == "zero3" and manifest["layout"]["workers"] == 2
    shards = [name for name in manifest["files"] if name.endswith("optim_states.pt")]
    assert len(shards) == 2

    # What is printed last: the tables, three samples, the paths.
    for channel in CHANNELS:
        assert re.search(rf"^{channel}\s+\d+\.\d+\s+\d+\.\d+", said, re.MULTILINE), channel
    for channel in FIXED_CHANNELS:
        assert re.search(rf"^{channel}\s+\d+/2\s+\d+/2", said, re.MULTILINE), channel
    assert len(re.findall(r"^sample of ", said, re.MULTILINE)) == 3
    for place in (folder, folder / "report.html", folder / "export"):
        assert str(place) in said and place.exists()

    (wandb_run,) = {path.parent for path in (folder / "wandb").glob("offline-run-*/*.wandb")}
    assert f"wandb sync {wandb_run}" in said
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "export")
    assert model.num_parameters() > 1e6


@pytest.mark.ray
def test_a_killed_worker_is_replaced_and_the_numbers_are_those_without_ray(
    demo, tmp_path, run_workers
):
    folder, _ = demo
    assert worker_groups_started(folder, size=2) == 2
    assert actors_of(folder) == {"TrainController", "RayTrainWorker", "SynchronizationActor"}
    assert json.loads((folder / "logs" / "outcome.json").read_text())["outcome"] == "completed"
    shutil.copy(folder / "config.yaml", tmp_path)
    shutil.copytree(folder / "prepared", tmp_path / "prepared")
    run_workers("train_runs.py", 2, tmp_path)
    assert losses(folder) == pytest.approx(losses(tmp_path), rel=1e-6)
    assert len(losses(folder)) == 6


@pytest.mark.ray
def test_nobody_else_reaches_its_ray(demo):
    """As it was seen while it trained: sockets on the loopback alone, folders of the user alone."""
    folder, _ = demo
    seen = json.loads((folder.parents[2] / "seen.json").read_text())
    programs = {program for _, program in seen["listening"]}
    assert {"gcs_server", "raylet"} < programs and any("RayTrainWorker" in p for p in programs)
    addresses = {address for address, _ in seen["listening"]}
    assert addresses <= {"127.0.0.1", "::ffff:127.0.0.1"}, seen["listening"]
    ((ray, mode),) = seen["modes"]
    assert mode == 0o700 and not Path(ray).parent.exists()
    kept = [path for path in (folder / "ray").rglob("*") if path.is_dir()]
    assert folder / "ray" / "logs" in kept
    assert [path for path in kept if path.stat().st_mode & 0o022] == []
    assert (folder / "ray" / "logs").stat().st_mode & 0o777 == 0o700
