"""Each wrong word: one clear message that names the key and the fix, and no stack trace."""

from __future__ import annotations

from pathlib import Path

import pytest
from posttrain_launch.cli import main

# words -> (what stands before the colon, a part of the fix)
CASES = {
    "misspelt key": (["train.stepz=3"], "train.stepz: unknown key", "train.steps?"),
    "new key": (["+objective.typo=1"], "objective.typo: unknown key", "--cfg job"),
    "key without its group": (["lr=1e-3"], "lr: unknown key", "optimizer.lr?"),
    "key in the wrong group": (["train.lr=1"], "train.lr: unknown key", "optimizer.lr?"),
    "key of another option": (["engine.stage=2"], "engine.stage: unknown key", "engine=zero0"),
    "key of Ray": (["cluster.workers=2"], "cluster.workers: unknown key", "cluster=ray"),
    "Hugging Face": (["learning_rate=1e-5"], "learning_rate: ", "optimizer.lr"),
    "axolotl": (["+sequence_len=2048"], "sequence_len: ", "data.max_length"),
    "LLaMA-Factory": (["cutoff_len=2048"], "cutoff_len: ", "data.max_length"),
    "ms-swift": (["val_dataset=x"], "val_dataset: ", "data.eval"),
    "accumulation": (["gradient_accumulation_steps=4"], "gradient_", "train.batch_size"),
    "adapters": (["lora_r=8"], "lora_r: ", "tuning=lora tuning.rank="),
    "foreign inside a group": (["train.num_train_epochs=1"], "train.num_", "train.epochs"),
    "a threshold of old": (["diagnose.rise=2"], "diagnose.rise: unknown key", "a constant of its"),
    "renamed": (["template.policy=all"], "template.policy: unknown key", "template.supervise"),
    "text for a number": (["train.steps=abc"], "train.steps: 'abc'", "whole number or null"),
    "fraction for a number": (["train.batch_size=1.5"], "train.batch_size: 1.5", "whole number"),
    "word for a flag": (["checkpoint.export=maybe"], "checkpoint.export: ", "true or false"),
    "no such member": (["optimizer.schedule=cos"], "optimizer.schedule: ", "cosine, linear"),
    "value for a group": (["model=/models/x"], "model: is a group", "model.path"),
    "no such option": (["engine=zero9"], "engine: there is no option zero9", "zero3_offload"),
    "a method of elsewhere": (
        ["tuning=houlsby"],
        "tuning: there is no option houlsby",
        "tuning=bottleneck tuning.placement=houlsby",
    ),
    "an optimizer of elsewhere": (
        ["optimizer=adamw_bnb_8bit"],
        "optimizer: there is no option adamw_bnb_8bit",
        "optimizer=adamw_8bit",
    ),
    "an optimizer by key": (["+optim=paged_adamw"], "optim: ", "optimizer=paged_adamw_32bit"),
    "bits": (["quantization_bit=8"], "quantization_bit: ", "8-bit weights are not there"),
    "no such experiment": (["+experiment=x"], "experiment: there is no option x", "demo"),
    "plus before a group": (["+engine=zero1"], "+engine=zero1: has", "engine=zero1"),
    "parenthesis": (["data.train=/a(1).jsonl"], "data.train: ", "'data.train=\"/a(1).jsonl\"'"),
    "equals": (["data.train=/a=b.jsonl"], "data.train: ", "'data.train=\"/a=b.jsonl\"'"),
    "comma": (["data.train=/a,b.jsonl"], "data.train: ", "'data.train=\"/a,b.jsonl\"'"),
    "no value": (["train.steps"], "train.steps: is not of the form", "train.steps=<value>"),
    "deletion": (["~train.steps"], "~train.steps: ", "train.steps=<value>"),
    "interpolation": (["name=${nosuch}"], "name: ", "nosuch"),
    "out of range": (["train.batch_size=0"], "train.batch_size: is 0", "1 or more"),
    "how many layers": (
        ["model.activation_checkpointing=selective"],
        "model.checkpoint_layers: is null",
        "how many layers",
    ),
    "layers of no choice": (
        ["model.checkpoint_layers=2"],
        "model.checkpoint_layers: is 2",
        "selective",
    ),
    "compiled shards": (["model.compile=true", "engine=zero3"], "model.compile: is on", "zero2"),
    "contradiction": (["train.steps=1", "train.epochs=1"], "train.steps: ", "one of the three"),
    "single with workers": (["cluster=ray", "cluster.workers=2"], "engine: single", "zero0"),
    "name that is a path": (["name=a/b"], "name: ", "letters"),
    "folder of YAML": (
        ["--config-dir", "/nosuch", "seed=1"],
        "--config-dir: there is no folder",
        "YAML",
    ),
    "another file to begin with": (
        ["--config-name", "nosuch", "seed=1"],
        "Cannot find primary config 'nosuch'",
        "posttrain train --help",
    ),
    "a pickle": (
        ["--experimental-rerun", "config.pickle", "seed=1"],
        "--experimental-rerun: is not supported",
        "posttrain run",
    ),
    "training on Slurm": (["cluster=slurm"], "cluster: slurm", "posttrain submit"),
    "an unwritable place": (["output_root=/dev/null/x"], "output_root: ", "may write to"),
}


@pytest.mark.parametrize("case", CASES)
def test_one_message(case, capsys):
    words, where, fix = CASES[case]
    assert main(["train", *words]) in (1, 2)
    shown = capsys.readouterr()
    text = "".join(shown.err.splitlines(keepends=True))
    assert text.startswith(f"error: {where}"), text
    assert fix in text
    assert "Traceback" not in text + shown.out
    assert shown.out == ""


def test_all_problems_come_together(capsys):
    words = ["train.stepz=3", "train.steps=x", "engine=zz", "lora_r=1", "seed", "name=a,b"]
    words += ["train.batch_size=0", "data.eval_fraction=2"]
    assert main(["train", *words]) == 2
    text = capsys.readouterr().err
    assert "8 problems" in text
    for where in ("train.stepz:", "train.steps:", "engine:", "lora_r:", "seed:", "name:"):
        assert f"- {where}" in text
    assert "- train.batch_size: is 0" in text
    assert "- data.eval_fraction: is 2.0" in text


def test_a_sweep_is_checked_before_its_first_trial(capsys):
    assert main(["train", "-m", "train.steps=1,x", "engine=single,zz"]) == 2
    text = capsys.readouterr().err
    assert "- train.steps: 'x'" in text
    assert "- engine: there is no option zz" in text


EXPERIMENTS = {
    "lines": (
        "# @package _global_\ntrain:\n  stepz: 3\noptimizer:\n  lr: fast\n",
        [":3: train.stepz: unknown key", ":5: optimizer.lr: 'fast' is not a number"],
    ),
    "no package": ("train:\n  steps: 3\n", [":1: ", "# @package _global_"]),
    "not YAML": ("# @package _global_\ntrain: {steps: 3\nname: x\n", [":3: is not YAML"]),
    "no option": (
        "# @package _global_\ndefaults:\n  - override /engine: zz\n",
        [":3: engine: there is no option zz", "zero3"],
    ),
    "other engine": (
        "# @package _global_\nengine:\n  stage: 3\n",
        [":3: engine.stage: unknown key", "engine=zero0"],
    ),
}


@pytest.mark.parametrize("case", EXPERIMENTS)
def test_a_faulty_experiment_names_its_line(case, tmp_path: Path, capsys):
    text, wanted = EXPERIMENTS[case]
    file = tmp_path / "experiment" / "mine.yaml"
    file.parent.mkdir()
    file.write_text(text)
    assert main(["train", "--config-dir", str(tmp_path), "+experiment=mine"]) == 2
    shown = capsys.readouterr().err
    assert str(file) in shown
    for part in wanted:
        assert part in shown
    assert "Traceback" not in shown


def test_debug_shows_the_trace(capsys):
    assert main(["train", "train.stepz=3", "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err
