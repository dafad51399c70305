"""Memory that is not there: the kernel refuses it, and a run goes on with less or says so."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import yaml
from ray_runs import processes_of, worker_groups_started

from posttrain_dist.config import RunConfig
from posttrain_dist.files import read_object, read_rows
from posttrain_dist.planner.fallbacks import choose
from posttrain_dist.planner.machine import find_machine
from posttrain_dist.planner.overriding import with_words
from posttrain_dist.planner.plan_file import read_choice

POSTTRAIN = Path(sysconfig.get_path("scripts")) / "posttrain"
WORKERS = Path(__file__).parents[2] / "workers"
LIMITED = WORKERS / "limited.py"
# The libraries take 350 MB, the first plan 700 MB more, the one after it 150 MB.
LIMIT_BYTES = 800_000_000
STEPS = 1


@pytest.fixture(scope="module")
def words(tmp_path_factory, builders) -> list[str]:
    """A run whose memory is nearly all activations: an MLP 500 times as wide as the model."""
    root = tmp_path_factory.mktemp("wide")
    model = builders.model(root / "model", intermediate_size=16384)
    rows = builders.write(root / "rows.jsonl", builders.rows(200))
    return [
        f"model.path={model}",
        f"data.train={rows}",
        "data.max_length=256",
        f"train.steps={STEPS}",
        "data.eval_fraction=0",
        "train.batch_size=4",
        "train.dtype=float32",
        "checkpoint.export=false",
        "eval.generate_rows=0",
        "logging.wandb=off",
    ]


def limited(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(LIMITED), str(LIMIT_BYTES), str(POSTTRAIN), "train", *words]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def run_folder(root: Path) -> Path:
    (found,) = (root / "outputs" / "run").iterdir()
    return found


def test_auto_starts_again_on_the_next_fallback(words, tmp_path):
    done = limited(tmp_path, *words, "tuning=auto", "engine=auto")
    assert done.returncode == 0, done.stdout + done.stderr
    folder = run_folder(tmp_path)
    assert (folder / "FINISHED").is_file()
    assert read_rows(folder / "metrics.jsonl")[-1]["step"] == STEPS
    # It says so in one line, and the folder is that of what was trained.
    (line,) = [each for each in done.stdout.splitlines() if "starting again" in each]
    assert "out of memory" in line and "(the rehearsal)" in line
    config = yaml.safe_load((folder / "config.yaml").read_text())
    choice, lineage = read_choice(folder), read_object(folder / "run.json")
    first = choice.tried[0].plan
    assert "train.micro_batch_size=4" in first.overrides
    assert config["train"]["micro_batch_size"] == 1, "what takes least of the same method"
    assert config["model"]["activation_checkpointing"] == "full"
    assert config["choices"]["tuning"] == "auto", "what was asked for stays to be seen"
    assert choice.chosen.plan.device.total_bytes < 0.5 * first.device.total_bytes
    assert list(choice.chosen.plan.overrides) == lineage["plan"]["overrides"]
    (failed,) = lineage["fallbacks"]
    assert failed["tried"] == "full" and "activations" in failed["what"]
    assert all(word in line for word in choice.chosen.plan.overrides)


@pytest.mark.slow
def test_a_named_method_is_not_changed_and_the_error_names_what_fits(words, tmp_path):
    named = ("tuning=full", "engine=single", "train.micro_batch_size=8")
    done = limited(tmp_path, *words, *named)
    assert done.returncode == 1
    folder = run_folder(tmp_path)
    assert not (folder / "FINISHED").exists() and not (folder / "checkpoints").exists()
    assert "starting again" not in done.stdout
    (message,) = [each for each in done.stderr.split("error: ") if "out of memory" in each]
    # The first batch goes forward for the check of the head, before the first step does it: where
    # that fits, the step does not.
    assert re.match(r"(before )?step 1: out of memory in the (forward and loss|backward)", message)
    assert "most of it activations" in message
    # The words are those of a plan that takes clearly less than this one's.
    proposal = message.partition("fix: use ")[2].partition(" (")[0].split()
    config = RunConfig.from_yaml((folder / "config.yaml").read_text())
    machine = find_machine(config, plans_only=False)
    instead = choose(with_words(config, proposal), machine).chosen.plan
    failed = read_choice(folder).chosen.plan
    assert instead.fits and instead.device.total_bytes < 0.95 * failed.device.total_bytes
    assert config.tuning == with_words(config, proposal).tuning, "the method stays"


@pytest.mark.slow
def test_a_python_program_falls_back_too(words, tmp_path):
    first = limited(tmp_path, *words, "tuning=auto", "engine=auto")
    assert first.returncode == 0
    # The same frozen run once more, from the choice that failed.
    made, folder = run_folder(tmp_path), tmp_path / "called"
    folder.mkdir()
    plan = read_object(made / "plan.json")
    plan["choice"]["leanest"] = False
    (folder / "plan.json").write_text(json.dumps(plan))
    text = (made / "config.yaml").read_text()
    for old, new in (("micro_batch_size: 1", "micro_batch_size: 4"), ("ng: full", "ng: none")):
        assert old in text
        text = text.replace(old, new)
    (folder / "config.yaml").write_text(text)
    program = tmp_path / "program.py"
    program.write_text(
        "from pathlib import Path\n"
        "from posttrain_dist.config import RunConfig\n"
        "from posttrain_dist.run import run\n"
        f"folder = Path({str(folder)!r})\n"
        "print(run(RunConfig.from_yaml((folder / 'config.yaml').read_text()), folder))\n"
    )
    command = [sys.executable, str(LIMITED), str(LIMIT_BYTES), sys.executable, str(program)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "starting again with full" in done.stdout
    assert f"Outcome(completed=True, step={STEPS}" in done.stdout
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["train"]["micro_batch_size"] == 1


@pytest.mark.ray
@pytest.mark.slow
def test_ray_starts_new_workers_for_the_next_fallback(words, tmp_path):
    """Only the worker is limited: the threads of Ray's own processes would not fit below it."""
    limit = {"PYTHONPATH": str(WORKERS / "limited_training"), "LIMIT_MORE_BYTES": "600_000_000"}
    on_ray = ("cluster=ray", "cluster.workers=1", "cluster.max_failures=3")
    done = subprocess.run(
        [POSTTRAIN, "train", *words, "tuning=auto", "engine=auto", *on_ray],
        cwd=tmp_path,
        env={**os.environ, **limit},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    folder = run_folder(tmp_path)
    assert (folder / "FINISHED").is_file()
    assert read_rows(folder / "metrics.jsonl")[-1]["step"] == STEPS
    (line,) = [each for each in done.stdout.splitlines() if "starting again" in each]
    assert "out of memory" in line and "(the rehearsal)" in line
    choice, lineage = read_choice(folder), read_object(folder / "run.json")
    assert all(word in line for word in choice.chosen.plan.overrides)
    assert list(choice.chosen.plan.overrides) == lineage["plan"]["overrides"]
    assert len(lineage["fallbacks"]) == 1
    # Each choice had one group of workers: the first was not tried again in the same memory. Of the
    # two Rays the logs of the last are kept.
    assert worker_groups_started(folder, size=1) == 1
    starts = (folder / "logs" / "rank-0.log").read_text().count("posttrain_dist.train: planned: ")
    assert starts == 2
    assert processes_of(folder) == []
