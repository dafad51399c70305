"""Files, rows and machines that do not fit: one message that names the place, and no trace."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from posttrain_launch.cli import main

SETTINGS = ["data.max_length=64", "data.eval_fraction=0", "train.steps=1", "logging.wandb=off"]
INDEX = "model.safetensors.index.json"


@pytest.fixture
def try_out(tiny_llama: Path, rows_file: Path, tmp_path: Path, capsys):
    """Type a command over words that would work; gives what it says on standard error."""
    good = {"model.path": tiny_llama, "data.train": rows_file, "output_root": tmp_path / "out"}

    def type_in(*words: str, verb: str = "train") -> str:
        typed = {word.partition("=")[0] for word in words}
        given = [f"{key}={value}" for key, value in good.items() if key not in typed]
        assert main([verb, *given, *SETTINGS, *words]) in (1, 2)
        shown = capsys.readouterr()
        assert shown.err.startswith("error: ")
        assert "fix:" in shown.err
        assert "Traceback" not in shown.err + shown.out
        return shown.err

    return type_in


# ------------------------------------------------------------------------------------ rows

TURNS = '{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}'
ROWS = {
    # the second line of the file -> (what is said after `file:2 `, a part of the fix)
    "not JSON": ('{"messages": [}', "(byte {14}): is not valid JSON", "one JSON object a line"),
    "no assistant": (
        '{"messages": [{"role": "user", "content": "q"}]}',
        "has no assistant turn",
        "add {",
    ),
    "unknown role": (TURNS.replace("user", "humam"), "messages[0].role is 'humam'", "assistant"),
    "a number": (TURNS.replace('"q"', "5"), "messages[0].content is a number, expected", "string"),
    "null": (TURNS.replace('"q"', "null"), "messages[0].content is null", "string"),
}


@pytest.mark.parametrize("case", ROWS)
def test_a_bad_row_is_named_by_its_line(case, try_out, tmp_path):
    line, wanted, fix = ROWS[case]
    first = TURNS + "\n"
    data = tmp_path / "rows.jsonl"
    data.write_text(first + line + "\n")
    said = try_out(f"data.train={data}")
    wanted = wanted.replace("{14}", str(len(first) + 14))  # bytes from the start of the file
    place, _, rest = said.removeprefix("error: ").partition(" ")
    assert place == f"{data}:2"
    assert wanted in rest and fix in rest
    assert rest.endswith("nothing was begun, and no run folder is left\n")
    assert not (tmp_path / "out" / "run").exists()


def test_a_channel_without_a_supervised_token(try_out, builders, tmp_path):
    rows = [builders.chat("q", "a", "fine"), builders.chat("q" * 90, "b", "lost")]
    data = builders.write(tmp_path / "rows.jsonl", rows)
    said = try_out(f"data.train={data}")
    assert f"error: {data}:2: channel 'lost' has no supervised token" in said
    assert "data.max_length" in said


# ----------------------------------------------------------------------------- model folders


def remove_weights(model: Path) -> str:
    (model / "model.safetensors").unlink()
    return f"{model}: has no weights"


def truncate(model: Path) -> str:
    os.truncate(model / "model.safetensors", 5000)
    return f"{model}/model.safetensors: is truncated: 5000 bytes"


def leave_the_folder(model: Path) -> str:
    index = {"weight_map": {"model.norm.weight": "../elsewhere.safetensors"}}
    (model / INDEX).write_text(json.dumps(index))
    return f"{model}/{INDEX}: names a shard outside of the folder: '../elsewhere.safetensors'"


@pytest.mark.parametrize("damage", [remove_weights, truncate, leave_the_folder])
@pytest.mark.parametrize("verb", ["train", "submit"])
def test_a_damaged_model_folder_is_named_and_nothing_is_made(
    damage: Callable[[Path], str], verb, try_out, tiny_llama, tmp_path
):
    model = tmp_path / "model"
    shutil.copytree(tiny_llama, model)
    wanted = damage(model)
    assert wanted in try_out(f"model.path={model}", verb=verb)
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------- before the run folder


def test_everything_that_can_be_seen_early_is_told_at_once(try_out, tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))  # and no netrc
    (tmp_path / "file").touch()
    words = ["model.path=/no/model", "data.train=/no/rows.jsonl", "data.eval=/no/held*.jsonl"]
    words += ["train.resume=/no/step-1", "logging.wandb=online", f"output_root={tmp_path}/file"]
    words += ["engine=zero2", "engine.config=/no/ds.json", "train.batch_size=0"]
    places = [
        "train.batch_size: is 0",
        "/no/ds.json: cannot be read",
        "/no/model: there is no such model folder",
        "/no/rows.jsonl: no file",
        "/no/held*.jsonl: no file",
        "/no/step-1: ",
        "logging.wandb: is online",
        "output_root: the run folder cannot be made",
    ]
    said = try_out(*words)
    assert said.startswith("error: 8 problems")
    for place in places:
        assert f"\n- {place}" in said
    assert said.count("  fix: ") == 8
    assert (tmp_path / "file").read_text() == ""

    # The same beside words that do not even compose.
    said = try_out(*words, "train.stepz=3", "data.pack_window=many", "name=a,b")
    assert said.startswith("error: 11 problems")
    for place in [*places, "train.stepz: unknown key", "data.pack_window: 'many'", "name: a,b"]:
        assert f"\n- {place}" in said
    assert "train.steps?" in said  # the nearest key
    assert "'name=\"a,b\"'" in said  # how to quote


def test_submit_looks_before_it_writes_a_job(try_out, tmp_path):
    asked = ["cluster.nodes=4", "cluster.gpus_per_node=0", "cluster.time=01:00:00"]
    said = try_out("model.path=/no/model", "data.train=/no/rows", *asked, verb="submit")
    assert "3 problems" in said
    assert "- /no/model: " in said and "- /no/rows: " in said
    assert "- engine: single runs in one process, and 4 workers would start" in said
    assert "cluster: a job is submitted to Slurm" in try_out("cluster=local", verb="submit")
    assert "cluster.address: is not set" in try_out("cluster=ray", verb="submit")
    assert "posttrain submit" in try_out("cluster=ray", "cluster.address=http://head:8265")
    assert "cluster: slurm: a training on Slurm is submitted" in try_out("cluster=slurm")
    assert not (tmp_path / "out").exists()


GPUS, TIME = "cluster.gpus_per_node", "cluster.time"
UNSAID = {
    (): f"{GPUS}: is not set, and has no default; nor is {TIME}\n  fix: set {GPUS}=<8, or 0 for a "
    f"job on CPUs>; {TIME}=<08:00:00, the time that the job may take>; or say what the nodes are, "
    "such as hardware=h100x8\n",
    (f"{GPUS}=0",): f"{TIME}: is not set, and has no default\n  fix: set {TIME}=<08:00:00, the",
    (f"{TIME}=1-00",): f"{GPUS}: is not set, and has no default\n  fix: set {GPUS}=<8, or 0 for",
}


@pytest.mark.parametrize("words", UNSAID)
def test_a_job_says_what_it_asks_for(words, try_out, tmp_path):
    said = try_out("engine=zero1", "cluster.nodes=4", *words, verb="submit")
    assert said.startswith(f"error: {UNSAID[words]}")
    assert not (tmp_path / "out").exists()


def test_each_verb_looks_at_what_it_uses(try_out, tmp_path):
    from posttrain_dist.config import RunConfig, complete
    from posttrain_dist.preflight import input_problems

    said = try_out("model.path=/no/model", "data.train=/no/rows", verb="inspect")
    assert "2 problems" in said
    said = try_out("data.train=/no/rows", "data.eval=/no/held-out", verb="evaluate")
    assert said.startswith("error: /no/held-out: ")
    config = complete(RunConfig())
    config.train.resume = str(tmp_path)
    assert input_problems(config, "inspect") == input_problems(config, "evaluate") == []
    assert [problem.where for problem in input_problems(config)] == [str(tmp_path)]


def test_a_checkpoint_to_start_from_may_be_named_by_its_run(builders, tmp_path):
    from posttrain_dist.checkpoint.manifest import MANIFEST, Layout, Manifest, Recipe
    from posttrain_dist.config import RunConfig, complete
    from posttrain_dist.files import digest_of
    from posttrain_dist.preflight import input_problems

    step = tmp_path / "run" / "checkpoints" / "step-000002"
    (step / "state").mkdir(parents=True)
    (step / "state" / "x").write_text("12345")
    manifest = Manifest(
        step=2, recipe=Recipe([]), layout=Layout("single", 1, "float32"),
        files={"state/x": digest_of(step / "state" / "x")},
    )  # fmt: skip
    (step / MANIFEST).write_text(manifest.to_json())
    config = complete(RunConfig(output_root=str(tmp_path)))
    for named in (tmp_path / "run", step):
        config.train.resume = str(named)
        assert input_problems(config) == []
    os.truncate(step / "state" / "x", 4)
    for named in (tmp_path / "run", step):
        config.train.resume = str(named)
        assert [problem.where for problem in input_problems(config)] == [str(step)]
