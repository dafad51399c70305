"""The demo, shortened: one command, two Ray workers, ZeRO-3, and everything that it promises."""

from __future__ import annotations

import json
import re
import subprocess
import sysconfig
from pathlib import Path

import pytest

from posttrain_dist.files import read_rows

POSTTRAIN = Path(sysconfig.get_path("scripts")) / "posttrain"


@pytest.mark.ray
def test_one_command_trains_and_tells(tmp_path):
    import transformers

    from posttrain_dist.data.embedded import CHANNELS, FIXED_CHANNELS

    short = ["train.steps=12", "train.eval_every=6", "eval.generate_rows=2", "eval.samples=3"]
    done = subprocess.run(
        [str(POSTTRAIN), "train", "+experiment=demo", *short],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (folder,) = (tmp_path / "outputs" / "demo").iterdir()
    assert json.loads((folder / "FINISHED").read_text()) == {"reason": "completed", "step": 12}

    rows = read_rows(folder / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(13))
    evaluated = [row for row in rows if "eval/loss" in row]
    assert [row["step"] for row in evaluated] == [0, 6, 12]
    assert evaluated[-1]["eval/loss"] < evaluated[0]["eval/loss"] - 0.1
    for channel in CHANNELS:
        assert f"eval_channel_loss/{channel}" in evaluated[0]

    # It was ZeRO-3 on two ranks, truly sharded: each rank saved its part of the parameters.
    (checkpoint,) = (folder / "checkpoints").glob("step-*")
    manifest = json.loads((checkpoint / "MANIFEST.json").read_text())
    assert manifest["layout"]["engine"] == "zero3" and manifest["layout"]["workers"] == 2
    shards = [name for name in manifest["files"] if name.endswith("optim_states.pt")]
    assert len(shards) == 2

    # What is printed last: the tables, three samples, the paths.
    said = done.stdout
    for channel in CHANNELS:
        assert re.search(rf"^{channel}\s+\d+\.\d+\s+\d+\.\d+", said, re.MULTILINE), channel
    for channel in FIXED_CHANNELS:
        assert re.search(rf"^{channel}\s+\d+/2\s+\d+/2", said, re.MULTILINE), channel
    assert len(re.findall(r"^sample of ", said, re.MULTILINE)) == 3
    for place in (folder, folder / "report.html", folder / "export"):
        assert str(place) in said and place.exists()

    assert list((folder / "wandb").glob("offline-run-*/*.wandb"))
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "export")
    assert model.num_parameters() > 1e6
