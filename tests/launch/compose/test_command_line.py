"""Flags and overrides in any order; what is neither is told what to write instead."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from posttrain_launch.cli import VERBS, main
from posttrain_launch.compose.command_line import read_command_line
from posttrain_launch.compose.composer import Composer, without_hydra
from posttrain_launch.compose.hydra_app import flag_faults
from posttrain_launch.compose.misused_words import Words, word_problems

from posttrain_dist import __version__
from posttrain_dist.errors import ConfigError

PRINTS = ["--cfg", "job", "--package", "optimizer"]
ANY_ORDER = [
    ["optimizer.lr=3", "seed=1", *PRINTS],
    [*PRINTS, "optimizer.lr=3", "seed=1"],
    ["optimizer.lr=3", *PRINTS, "seed=1"],
    ["--cfg", "job", "optimizer.lr=3", "-p", "optimizer", "seed=1"],
    ["--cfg=job", "optimizer.lr=3", "--package=optimizer"],
    ["-c", "job", "seed=1", "-p", "optimizer", "--", "optimizer.lr=3"],
]


@pytest.mark.parametrize("words", ANY_ORDER)
def test_flags_and_overrides_come_in_any_order(words):
    line = read_command_line("train", words, debug=False)
    assert set(line.overrides) - {"seed=1"} == {"optimizer.lr=3"}
    assert (line.flags.cfg, line.flags.package) == ("job", "optimizer")
    assert not line.misused and not line.faults and line.shows_only


def test_a_key_behind_a_flag_counts(capsys):
    assert main(["train", "model.path=x", *PRINTS, "optimizer.lr=3"]) == 0
    assert "\nlr: 3.0\n" in capsys.readouterr().out


def test_submit_takes_a_flag_in_the_middle(capsys):
    assert main(["submit", "cluster.nodes=2", "--cfg", "job", "seed=3", "-p", "cluster"]) == 0
    assert "nodes: 2\n" in capsys.readouterr().out


def test_a_sweep_in_any_order(capsys):
    assert main(["train", "optimizer.lr=1e-3,x", "-m", "model.path=/nowhere"]) == 2
    assert capsys.readouterr().err.startswith("error: optimizer.lr: 'x' is not a number")


def test_an_optional_value_is_taken_only_where_it_is_one():
    for words, asked in ((["--info", "seed=1"], "all"), (["--info", "config", "seed=1"], "config")):
        line = read_command_line("train", words, debug=False)
        assert (line.flags.info, line.overrides, line.misused) == (asked, ["seed=1"], [])


@pytest.mark.parametrize("verb", VERBS)
def test_the_version_is_ours(verb, capsys):
    assert main([verb, "--version"]) == 0
    assert capsys.readouterr().out == f"posttrain {__version__}\n"


# words -> (the one error's place, its fix)
MISUSED = {
    "spelling": (["--learning_rate", "1e-5"], "--learning_rate", "write optimizer.lr=1e-5 (that"),
    "dashes": (["--learning-rate=1e-5"], "--learning-rate", "write optimizer.lr=1e-5 (that"),
    "our key": (["--optimizer.lr=3"], "--optimizer.lr", "write optimizer.lr=3"),
    "our key, apart": (["--optimizer.lr", "3"], "--optimizer.lr", "write optimizer.lr=3"),
    "group": (["--engine", "zero3"], "--engine", "write engine=zero3"),
    "group alone": (["--engine"], "--engine", "write engine=<one of auto, single, zero0"),
    "a word of theirs": (["--bf16", "seed=1"], "--bf16", "set train.dtype=bfloat16"),
    "template": (["--chat_template", "llama3"], "--chat_template", "choose template=llama3"),
    "model": (["--model", "/m"], "--model", "write model.path=/m"),
    "misspelt key": (["--train.stepz", "3"], "--train.stepz", "did you mean train.steps=3?"),
    "misspelt flag": (["--multirn", "seed=1"], "--multirn", "did you mean --multirun?"),
    "unknown": (["--zzz", "3"], "--zzz", "posttrain train --help lists the flags"),
    "one letter": (["-x"], "-x", "posttrain train --help lists the flags"),
    "file": (["--config", "my.yaml"], "--config", "--config-dir DIR +experiment=my;"),
    "file=": (["--config=my.yaml"], "--config", "--config-dir DIR +experiment=my;"),
    "bare file": (["my.yaml"], "my.yaml", "--config-dir DIR +experiment=my;"),
    "its folder": (["a/experiment/my.yml"], "a/experiment/my.yml", "--config-dir a +experiment=my"),
    "rows": (["/d/chat.jsonl"], "/d/chat.jsonl", "write data.train=/d/chat.jsonl"),
    "option": (["zero3"], "zero3", "write engine=zero3"),
    "experiment": (["demo"], "demo", "write +experiment=demo"),
    "verb": (["inspect"], "inspect", "posttrain inspect, as a command of its own"),
    "key": (["train.steps"], "train.steps", "write train.steps=<value>"),
    "key and value": (["train.steps", "5"], "train.steps", "write train.steps=5"),
    "spaces": (["train.steps", "=", "5"], "train.steps", "write train.steps=5"),
    "dry run": (["--dry-run", "seed=1"], "--dry-run", "leave it out"),
    "no value": (["--cfg"], "--cfg", "write --cfg job"),
    "no choice": (["--cfg", "all_of_it"], "--cfg", "use one of: job, hydra, all"),
    "two flags": (["-m", "--cfg", "job", "seed=1"], "--cfg", "give one of them"),
    "resolve": (["--resolve", "seed=1"], "--resolve", "add --cfg job"),
}


@pytest.fixture(scope="module")
def problems_of():
    """problems_of(words): what `posttrain train WORDS` says of those that are no overrides."""
    with Composer() as composer:
        base = without_hydra(composer.compose([]))

        def ask(words: list[str]) -> list[ConfigError]:
            line = read_command_line("train", words, debug=False)
            faults = [*line.faults, *flag_faults(line.flags)]
            return word_problems(Words("train", line.misused, faults), composer, base)

        yield ask


@pytest.mark.parametrize("case", MISUSED)
def test_a_word_that_is_neither_has_one_message(case, problems_of):
    words, where, fix = MISUSED[case]
    (problem,) = problems_of(words)
    assert problem.where == where
    assert fix in problem.fix


def test_it_is_an_error_as_every_other_one(capsys):
    assert main(["train", "--learning_rate", "1e-5"]) == 2
    shown = capsys.readouterr()
    assert shown.err == (
        "error: --learning_rate: is no flag; keys are given as key=value, without dashes\n"
        "  fix: write optimizer.lr=1e-5 (that is the name here)\n"
    )
    assert shown.out == ""


def test_a_folder_says_what_it_holds(tmp_path: Path, problems_of):
    (tmp_path / "config.json").touch()
    (problem,) = problems_of([str(tmp_path)])
    assert problem.fix == f"write model.path={tmp_path}"
    for name in ("config.yaml", "run.json"):
        (tmp_path / name).touch()
    for word in (tmp_path, tmp_path / "config.yaml"):
        (problem,) = problems_of([str(word)])
        assert problem.fix.startswith(f"posttrain run {tmp_path} goes on with")


def test_misused_words_are_told_beside_the_rest(capsys):
    assert main(["train", "--lora_r", "8", "train.stepz=1", "engine=zz", "~seed"]) == 2
    text = capsys.readouterr().err
    assert "4 problems" in text
    for place in ("--lora_r: ", "train.stepz: ", "engine: ", "~seed: a key cannot be taken out"):
        assert f"\n- {place}" in text


@pytest.mark.parametrize(
    ("word", "more"),
    [("~name", []), ("~optimizer", ["-m"]), ("~optimizer=adamw", ["--cfg", "job"])],
)
def test_no_key_is_taken_out(word, more, capsys):
    assert main(["train", "seed=1", word, *more]) == 2
    assert capsys.readouterr().err.startswith(f"error: {word}: a key cannot be taken out\n")


@pytest.mark.parametrize("name", ["ünï.jsonl", "数据/a b.jsonl", "x=é.jsonl"])
def test_letters_of_any_language_need_no_quotes(name, tmp_path: Path, capsys):
    file = tmp_path / name
    code = main(["train", f"data.train={file}", "--cfg", "job", "-p", "data"])
    shown = capsys.readouterr()
    if "=" in name:  # this must be quoted, and no other character is blamed
        assert code == 2
        assert f"{file} holds = é, which must be quoted\n" in shown.err
        assert f"""fix: write 'data.train="{file}"'""" in shown.err
    else:
        assert yaml.safe_load(shown.out)["train"] == str(file)


@pytest.mark.parametrize(
    ("argument", "said"),
    [([], "RUN"), (["a", "--step", "x", "--zzz"], "--step")],
)
def test_the_other_verbs_say_it_in_the_same_form(argument, said, capsys):
    assert main(["export", *argument]) == 2
    text = capsys.readouterr().err
    assert text.startswith("error: posttrain export: ")
    assert said in text and "usage" not in text
    assert f"fix: {VERBS['export'].example}" in text
