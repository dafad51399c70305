"""The verbs, as typed: a run from its command to its report, stopped and gone on with."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import sys
import time
from pathlib import Path

import forkserver
import pytest
from posttrain_launch.cli import VERBS, main
from ray_runs import processes_of, wait_until

from posttrain_dist.config import SLOTS
from posttrain_dist.files import read_rows

BASE = ["data.max_length=128", "train.batch_size=2", "train.dtype=float32", "optimizer.lr=1e-2"]
BASE += ["logging.wandb=off", "data.eval_fraction=0.2"]


@pytest.fixture
def words(tiny_llama: Path, rows_file: Path, tmp_path: Path) -> list[str]:
    places = [f"model.path={tiny_llama}", f"data.train={rows_file}", f"output_root={tmp_path}/out"]
    return [*places, *BASE]


def run_folder(tmp_path: Path) -> Path:
    (found,) = (tmp_path / "out" / "run").glob("2*")
    return found


def rows_of(folder: Path) -> list[dict]:
    return read_rows(folder / "metrics.jsonl")


def test_help_shows_every_verb_with_its_example(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    for name, verb in VERBS.items():
        assert re.search(rf"^  {name} +{re.escape(verb.what)}$", text, re.M)
        assert verb.example in text


@pytest.mark.parametrize("name", VERBS)
def test_each_verb_has_help_with_an_example(name, capsys):
    assert main([name, "--help"]) == 0
    shown = capsys.readouterr()
    assert f"posttrain {name}" in shown.out
    assert VERBS[name].example in shown.out
    if VERBS[name].hydra:
        assert "engine      auto, single, zero0, zero1" in shown.out
        assert "persistence_threshold" not in shown.out  # the config as typed: engine=single
        assert "max_length: 2048" in shown.out


def test_a_verb_that_is_not_there(capsys):
    assert main(["trian"]) == 2
    assert "posttrain train" in capsys.readouterr().err
    assert main(["engine=zero3"]) == 2
    assert "posttrain train engine=zero3" in capsys.readouterr().err


def test_a_run_from_command_to_report(words, tmp_path, capsys):
    assert main(["train", *words, "train.steps=4", "eval.generate_rows=1"]) == 0
    shown = capsys.readouterr()
    folder = run_folder(tmp_path)
    assert json.loads((folder / "FINISHED").read_text()) == {"reason": "completed", "step": 4}
    rows = rows_of(folder)
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4]
    # What is printed at the end is what was measured.
    first, last = rows[0]["eval/loss"], rows[-1]["eval/loss"]
    assert last < first
    table = [line.split() for line in shown.out.splitlines()]
    assert ["all", "channels", f"{first:.4f}", f"{last:.4f}"] in table
    for name in ("report.html", "export/model.safetensors", "answers.json"):
        assert (folder / name).is_file()
    assert "Loading weights" not in shown.out + shown.err  # noise of libraries

    assert main(["run", str(folder)]) == 0
    assert "is already finished" in capsys.readouterr().out
    assert len(rows_of(folder)) == 5

    # The export's held-out loss is that of the run's last step.
    evaluated = [w for w in words if not w.startswith("model.path")]
    assert main(["evaluate", f"model.path={folder}/export", *evaluated]) == 0
    table = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert float({" ".join(r[:-1]): r[-1] for r in table if r}["all channels"]) == (
        pytest.approx(last, abs=2e-4)
    )


@pytest.mark.parametrize(
    "chosen",
    [(), pytest.param(("tuning=auto", "engine=auto"), marks=pytest.mark.slow)],
    ids=["here", "in a process of its own"],
)
def test_ctrl_c_saves_and_run_goes_on(chosen, words, tmp_path, capsys):
    command, output = tmp_path / "command.py", tmp_path / "output"
    command.write_text("import sys\nfrom posttrain_launch.cli import main\nsys.exit(main())\n")
    typed = (*words, *chosen, "train.steps=2000")
    process = forkserver.start(command, "train", *typed, output=output)
    try:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            found = list((tmp_path / "out" / "run").glob("2*/metrics.jsonl"))
            if found and found[0].read_text().count("\n") > 3:
                break
            time.sleep(0.05)
        os.kill(process.pid, signal.SIGINT)
        assert process.wait(120) == 130
    finally:
        process.kill()
    folder = run_folder(tmp_path)
    assert f"posttrain run {folder}" in output.read_text()
    assert not (folder / "FINISHED").exists()
    stopped = json.loads((folder / "logs" / "outcome.json").read_text())
    assert stopped["outcome"] == "stopped"
    assert 0 < stopped["step"] < 2000
    assert (folder / "checkpoints" / f"step-{stopped['step']:06d}").is_dir()

    # Shorten the run by hand, so that it ends soon.
    end = stopped["step"] + 2
    frozen = folder / "config.yaml"
    frozen.write_text(frozen.read_text().replace("steps: 2000", f"steps: {end}"))
    before = [row for row in rows_of(folder) if row["step"] <= stopped["step"]]
    capsys.readouterr()
    assert main(["run", str(folder)]) == 0
    assert f"going on from step {stopped['step']} with" in capsys.readouterr().out
    after = rows_of(folder)
    assert after[: len(before)] == before
    assert [row["step"] for row in after] == list(range(end + 1))
    assert not (folder / "STOP").exists()


@pytest.mark.slow
def test_two_ctrl_c_leave_at_once_also_what_trains_in_a_process_of_its_own(words, tmp_path):
    command, output = tmp_path / "command.py", tmp_path / "output"
    command.write_text("import sys\nfrom posttrain_launch.cli import main\nsys.exit(main())\n")
    typed = (*words, "tuning=auto", "engine=auto", "train.steps=2000")
    process = forkserver.start(command, "train", *typed, output=output)
    try:
        out = tmp_path / "out"
        wait_until(lambda: list(out.glob("run/2*/logs/plan.json")), timeout_s=120)
        os.kill(process.pid, signal.SIGINT)
        wait_until(lambda: list(out.glob("run/2*/STOP")), timeout_s=10)
        os.kill(process.pid, signal.SIGINT)
        assert process.wait(30) == 130
    finally:
        process.kill()
    folder = run_folder(tmp_path)
    assert processes_of(folder) == []
    assert not (folder / "FINISHED").exists()


def test_a_second_driver_is_refused(words, tmp_path, capsys):
    import fcntl

    from posttrain_launch.compose.composer import Composer
    from posttrain_launch.compose.problems import compose_checked
    from posttrain_launch.run.freeze import freeze

    with Composer() as composer:
        folder = freeze(compose_checked(composer, [*words, "train.steps=1"]), "c")
    with (folder / "logs" / "driver.lock").open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        assert main(["run", str(folder)]) == 1
    assert "another process drives this run" in capsys.readouterr().err


def test_inspect_marks_what_is_supervised(words, capsys):
    assert main(["inspect", *words]) == 0
    text = capsys.readouterr().out
    assert re.search(r"<\|user\|>copy (\w+) \d+<\|end\|><\|assistant\|>⟦\1<\|end\|>⟧", text)


def test_inspect_shows_what_the_checks_refuse_and_why(words, builders, tmp_path, capsys):
    data = builders.write(tmp_path / "silent.jsonl", [builders.chat("ask", "", "t")] * 8)
    assert main(["inspect", words[0], f"data.train={data}", "data.eval_fraction=0"]) == 1
    shown = capsys.readouterr()
    assert "<|user|>ask<|end|><|assistant|>⟦<|end|>⟧" in shown.out
    assert "8 of 8 rows fail the check 'empty_turn'" in shown.err


def test_a_value_that_no_trial_can_have_is_refused_before_the_first(words, tmp_path, capsys):
    sweep = ["optimizer.lr=1e-5,50", "train.batch_size=2,-1", "train.steps=1,2"]
    assert main(["train", "-m", *words, *sweep]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: 2 problems:\n- optimizer.lr: is 50.0, must be above 0")
    assert "- train.batch_size: is -1, must be at least 1" in said
    assert main(["train", "-m", *words, "optimizer.lr=interval(1e-5,50)"]) == 2  # of a sweeper
    assert capsys.readouterr().err.startswith("error: optimizer.lr: is 50.0, must be above 0")
    assert not (tmp_path / "out").exists()


def test_evaluate_scores_the_given_file_wholly(words, builders, tmp_path, capsys):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    texts = ["the fox", "the lazy dog jumps", "quick"]
    data = builders.write(tmp_path / "docs.jsonl", [{"text": text} for text in texts])
    model_path = words[0].partition("=")[2]
    # data.train is left at the embedded conversations, which this objective could not read.
    given = [words[0], "objective=pretrain", "train.dtype=float32"]
    assert main(["evaluate", *given, f"data.eval={data}"]) == 0
    table = {" ".join(line.split()[:-1]): line.split()[-1]
             for line in capsys.readouterr().out.splitlines() if line.split()}  # fmt: skip

    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    sums, count = 0.0, 0
    for text in texts:
        ids = torch.tensor([[*tokenizer(text)["input_ids"], tokenizer.eos_token_id]])
        with torch.no_grad():
            mean = model(input_ids=ids, labels=ids).loss
        sums, count = sums + float(mean) * (ids.numel() - 1), count + ids.numel() - 1
    assert (
        float(table["docs"])
        == float(table["all channels"])
        == pytest.approx(sums / count, abs=1e-4)
    )


def test_evaluate_needs_a_held_out_row(words, capsys):
    assert main(["evaluate", *words, "data.eval_fraction=0"]) == 1
    shown = capsys.readouterr()
    assert shown.err.startswith("error: data.eval: there is no held-out row\n  fix: set data.eval=")
    assert shown.out == ""


def test_each_trial_of_a_sweep_is_a_command_of_its_own(words, tmp_path, capfd):
    more = ["engine=zero1", "cluster.gpus_per_node=0", "cluster.time=00:10:00"]
    more += ["cluster.nodes=2,3", "model.path=/nowhere," + words[0].split("=")[1]]
    assert main(["submit", "-m", *words[1:], *more, "--dry-run"]) == 1
    shown = capfd.readouterr()
    rows = [line.split("  ") for line in shown.out.splitlines() if line.startswith("cluster.nodes")]
    states = [next(cell for cell in row[1:] if cell).strip() for row in rows]
    assert states == ["failed (2)", "done", "failed (2)", "done"]
    assert shown.err.count("error: /nowhere: there is no such model folder") == 2
    jobs = sorted((tmp_path / "out" / "run").glob("2*/job.sbatch"))
    nodes = [re.search(r"--nodes=(\d)", job.read_text()).group(1) for job in jobs]
    assert nodes == ["2", "3"]
    # Each was typed, so to speak, by itself.
    for job, number in zip(jobs, nodes, strict=True):
        typed = json.loads((job.parent / "run.json").read_text())["command"]
        assert f"cluster.nodes={number} " in typed and " -m " not in typed


def test_chat_answers_each_line_of_a_pipe(tiny_llama, capsys, monkeypatch):
    from posttrain_dist.data.chat.rendering.served import Prompt
    from posttrain_dist.generation.base import Sampling
    from posttrain_dist.generation.local import LocalGenerator

    prompts = ["copy abc", "reverse x"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(prompts) + "\n"))
    assert main(["chat", str(tiny_llama), "--max-new-tokens", "4"]) == 0
    told = capsys.readouterr().out.split("\n")[:-1]
    asked = [Prompt([{"role": "user", "content": p}]) for p in prompts]
    replies = LocalGenerator.load(tiny_llama).reply(asked, Sampling(max_new_tokens=4))
    assert told == [reply.text.strip().replace("\n", "\\n") for reply in replies]


def test_init_writes_yaml_that_composes(tmp_path, capsys):
    assert main(["init", "mine", "--dir", str(tmp_path)]) == 0
    written = (tmp_path / "experiment" / "mine.yaml").read_text()
    [objectives] = [each for each in written.splitlines() if "override /objective" in each]
    assert sorted(objectives.partition("# ")[2].split(" | ")) == sorted(SLOTS["objective"])
    command = capsys.readouterr().out.splitlines()[-1].split("posttrain ")[1].split()
    assert main([*command, "--cfg", "job", "-p", "train"]) == 0
    assert "steps: 20\n" in capsys.readouterr().out
    text = (tmp_path / "experiment" / "mine.yaml").read_text()
    assert main(["init", "mine", "--dir", str(tmp_path)]) == 1
    assert "already there" in capsys.readouterr().err
    assert (tmp_path / "experiment" / "mine.yaml").read_text() == text


def test_doctor_finds_what_is_installed(capsys):
    import torch

    assert main(["doctor"]) == 0
    lines = {line[6:20].strip(): line for line in capsys.readouterr().out.splitlines() if line}
    assert torch.__version__ in lines["torch"]
    assert lines["deepspeed"].startswith("ok")
    assert lines["ray"].startswith("ok")
