"""`posttrain train -m`: from what is typed to the table, with real trainings."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
from posttrain_launch.cli import main
from posttrain_launch.sweep.folder import read_sweep

from posttrain_dist.config import RunConfig
from posttrain_dist.files import read_rows

BASE = ["data.max_length=128", "train.batch_size=2", "train.dtype=float32", "train.steps=2"]
BASE += ["data.eval_fraction=0.2", "tuning=lora"]


@pytest.fixture
def words(tiny_llama: Path, rows_file: Path, tmp_path: Path) -> list[str]:
    places = [f"model.path={tiny_llama}", f"data.train={rows_file}", f"output_root={tmp_path}/out"]
    return [*places, *BASE]


def the_sweep(tmp_path: Path) -> Path:
    [folder] = (tmp_path / "out" / "run" / "sweeps").iterdir()
    return folder


def table_of(text: str) -> list[list[str]]:
    """The rows under the rule of the last table."""
    lines = text.splitlines()
    rule = max(i for i, line in enumerate(lines) if line and set(line) == {"-"})
    rows = [line.split() for line in lines[rule + 1 :]]
    return rows[: rows.index([])] if [] in rows else rows


def test_a_sweep_goes_on_after_a_trial_that_cannot_begin(words, tmp_path, capfd):
    more = [w for w in words if not w.startswith("data.train")]
    rows = next(w for w in words if w.startswith("data.train"))
    more += [f"data.train=/no/rows,{rows.removeprefix('data.train=')}", "optimizer.lr=1e-2"]
    assert main(["train", "-m", *more, "logging.wandb=offline"]) == 1
    shown = capfd.readouterr()
    folder = the_sweep(tmp_path)
    assert "error: /no/rows: no file has this name" in shown.out
    assert "Traceback" not in shown.err
    assert not (Path.cwd() / "multirun").exists()

    # The table: of the trial that ran what it measured, of the other why it did not.
    done, failed = table_of(shown.out.partition("trial 0 failed:")[0])
    measured = read_rows(folder / "trial-001" / "metrics.jsonl")
    assert done[:4] == ["1", rows, "done", f"{measured[-1]['eval/loss']:.4f}"]
    assert failed[:4] == ["0", "data.train=/no/rows", "failed", "-"]
    assert "trial 0 failed: /no/rows: no file has this name" in shown.out
    assert (folder / "trials.txt").read_text().splitlines()[2].split() == done

    # Its run in W&B is one of the sweep's group.
    sweep = read_sweep(folder)
    assert sweep.name == f"run-{folder.name}"
    settings = json.loads((folder / "trial-001" / "logs" / "wandb.json").read_text())
    assert settings["group"] == sweep.name
    lineage = json.loads((folder / "trial-001" / "run.json").read_text())
    assert lineage["id"] == f"run-{folder.name}-trial-001"

    # The command of the best is that of a run of its own.
    [command] = [line for line in shown.out.splitlines() if line.startswith("  posttrain train")]
    assert sorted(shlex.split(command)[2:]) == sorted([*words, "optimizer.lr=0.01",
                                                       "logging.wandb=offline"])  # fmt: skip

    # Nothing of it runs once more; the failed one does when that is asked for.
    assert main(["run", str(folder)]) == 1
    assert "trial 1:" not in capfd.readouterr().out
    assert main(["run", str(folder), "--failed"]) == 1
    assert "trial 0: data.train=/no/rows" in capfd.readouterr().out
    assert read_rows(folder / "trial-001" / "metrics.jsonl") == measured
    assert main(["report", str(folder)]) == 0
    assert capfd.readouterr().out.count("\n0") == 1


@pytest.mark.slow
def test_a_sweep_over_rank_alpha_and_rate_ends_in_one_table(words, tmp_path, capfd):
    more = ["tuning.rank=2,4", "tuning.alpha=4,8", "optimizer.lr=1e-3,3e-3", "logging.wandb=off"]
    assert main(["train", "-m", *words, *more]) == 0
    shown = capfd.readouterr().out
    folder = the_sweep(tmp_path)
    frozen = [
        RunConfig.from_yaml((folder / f"trial-{i:03d}" / "config.yaml").read_text())
        for i in range(8)
    ]
    found = [(c.tuning.rank, c.tuning.alpha, c.optimizer.lr) for c in frozen]
    assert found == [(r, a, lr) for r in (2, 4) for a in (4, 8) for lr in (1e-3, 3e-3)]

    # Sorted by the held-out loss of the last step, which is that of metrics.jsonl.
    last = {
        i: read_rows(folder / f"trial-{i:03d}" / "metrics.jsonl")[-1]["eval/loss"] for i in range(8)
    }
    table = table_of(shown.partition("\nthe best")[0])
    assert [int(row[0]) for row in table] == sorted(last, key=lambda i: (last[i], i))
    assert len(set(last.values())) > 4
    best = min(last, key=lambda i: last[i])
    winner = frozen[best].tuning
    assert f"\nthe best, trial {best}," in shown
    assert re.search(rf"posttrain train .*tuning\.rank={winner.rank} ", shown)

    # All of them read the same data in the same order.
    orders = {(folder / f"trial-{i:03d}" / "samples.log").read_bytes() for i in range(8)}
    assert len(orders) == 1
    hashes = [
        json.loads((folder / f"trial-{i:03d}" / "run.json").read_text())["hashes"] for i in range(8)
    ]
    for name in ("data", "tokenizer", "template", "data_report"):
        assert len({json.dumps(each[name]) for each in hashes}) == 1
    assert len({each["config"] for each in hashes}) == 8
    prepared = [folder / f"trial-{i:03d}" / "prepared" / "train.npy" for i in range(8)]
    assert len({path.stat().st_ino for path in prepared}) == 1  # one cache, linked
    assert len({config.seed for config in frozen}) == 1


def test_what_is_refused_before_anything_is_made(words, tmp_path, capsys):
    more = [*words, "optimizer.lr=1e-2"]
    for typed, where in (
        (["tuning.rank=2,4,2"], "tuning.rank=2 comes twice"),
        (["optimizer.lr=interval(1e-5,1e-2)"], "optimizer.lr: is a range without steps"),
        (["tuning.rank=2,4", "hydra/launcher=nowhere"], "hydra/launcher is one of basic"),
        (["tuning.rank=2,4", "hydra/launcher=slurm_array", "hydra.launcher.at_one=2"], "at_one"),
    ):
        given = [w for w in more if w.split("=")[0] not in {t.split("=")[0] for t in typed}]
        assert main(["train", "-m", *given, *typed]) == 2, typed
        assert where in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_values_that_only_together_cannot_be_are_refused_before_the_first(words, tmp_path, capsys):
    # Each engine goes with one worker, and each number of workers with ZeRO.
    more = ["cluster=ray", "engine=zero1,single", "cluster.workers=1,2", "optimizer.lr=1e-2"]
    assert main(["train", "-m", *words, *more]) == 2
    assert "engine: single" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_no_sweep_and_flags_of_the_other_kind(words, tmp_path, capsys):
    assert main(["run", str(tmp_path), "--failed"]) == 1
    assert "is no sweep" in capsys.readouterr().err
    assert main(["report", str(tmp_path), "--metric", "eval/loss"]) == 1
    assert "--metric: sorts the trials of a sweep" in capsys.readouterr().err
