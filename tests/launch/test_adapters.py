"""Adapter runs on the command line: chat, evaluate, export --merge, combine."""

from __future__ import annotations

import io
import json
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from posttrain_launch.cli import main

from posttrain_dist.config import (
    DataConfig,
    Dtype,
    ModelConfig,
    RunConfig,
    TrainConfig,
    complete,
)
from posttrain_dist.data.chat.rendering.served import Prompt
from posttrain_dist.engine import AdamW
from posttrain_dist.generation.adapter_places import stood_on_nf4
from posttrain_dist.generation.base import Sampling
from posttrain_dist.generation.local import LocalGenerator
from posttrain_dist.merge import combine_folders
from posttrain_dist.metrics import LoggingConfig, WandbMode
from posttrain_dist.prepare import prepare
from posttrain_dist.train import train
from posttrain_dist.tuning.adapters.combine import Combination
from posttrain_dist.tuning.base import Quantize
from posttrain_dist.tuning.bottleneck import Bottleneck
from posttrain_dist.tuning.lora import Lora
from posttrain_dist.tuning.prompt_tuning import Prompt as PromptTuning

ASKED = ["copy abc", "reverse stone"]
TEXT = [5, 80, 91, 7, 120, 44]
NEW = 6


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory, builders: Any) -> Path:
    """A base whose rows are blocks of NF4."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
    return builders.model(tmp_path_factory.mktemp("wide"), **sizes)


@pytest.fixture(scope="module")
def run_of(
    wide: Path, rows_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, Any], Path]:
    """run_of(name, tuning): the folder of a finished run of three steps."""
    root, made = tmp_path_factory.mktemp("runs"), dict[str, Path]()

    def run(name: str, tuning: Any, add_tokens: tuple[str, ...] = ()) -> Path:
        if name not in made:
            config = complete(
                RunConfig(
                    model=ModelConfig(path=str(wide), add_tokens=list(add_tokens)),
                    data=DataConfig(train=str(rows_file), max_length=64, eval_fraction=0.1),
                    tuning=tuning,
                    optimizer=AdamW(lr=3e-2),
                    train=TrainConfig(
                        steps=3, batch_size=4, micro_batch_size=1, dtype=Dtype.float32
                    ),
                    logging=LoggingConfig(wandb=WandbMode.off),
                )
            )
            made[name] = root / name
            prepare(config, made[name] / "prepared")
            train(config, made[name])
        return made[name]

    return run


@pytest.fixture
def lora(run_of: Callable[..., Path]) -> Path:
    return run_of("lora", Lora(rank=4))


@pytest.fixture
def other(run_of: Callable[..., Path]) -> Path:
    return run_of("other", Lora(rank=4, alpha=64.0))


def replies(folder: Path, adapter: str | None = None, **options: Any) -> list[str]:
    prompts = [Prompt([{"role": "user", "content": text}]) for text in ASKED]
    sampling = Sampling(max_new_tokens=NEW, adapter=adapter)
    found = LocalGenerator.load(folder, **options).reply(prompts, sampling)
    return [reply.text.strip().replace("\n", "\\n") for reply in found]


def chat(
    monkeypatch: pytest.MonkeyPatch, capsys: Any, *arguments: object, lines: list[str]
) -> tuple[int, list[str], str]:
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines) + "\n"))
    code = main(["chat", *map(str, arguments), "--max-new-tokens", str(NEW)])
    shown = capsys.readouterr()
    return code, shown.out.split("\n")[:-1], shown.err


def test_chat_takes_the_run_of_an_adapter_and_switches_between_adapters(
    wide: Path, lora: Path, other: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    code, told, _ = chat(monkeypatch, capsys, lora, lines=ASKED)
    assert code == 0 and told == replies(lora / "adapter")
    lines = [ASKED[0], "/adapter b", ASKED[0], "/adapter none", ASKED[0], "/adapter c", ASKED[0]]
    given = ["--adapter", f"a={lora}", f"--adapter=b={other / 'adapter'}"]
    code, told, err = chat(monkeypatch, capsys, wide, *given, lines=lines)
    answers = [replies(folder)[0] for folder in (lora / "adapter", other / "adapter")]
    base = replies(wide, tokenizer=LocalGenerator.load(lora / "adapter").tokenizer)[0]
    assert code == 0 and told == [*answers, base, base]
    assert "c: there is no adapter of this name" in err and "the base model answers" in err
    assert len({*answers, base}) == 3, "adapters that change nothing prove nothing"
    code, _, err = chat(monkeypatch, capsys, wide, "--adapter", str(lora), lines=ASKED)
    assert code == 1 and "write --adapter NAME=FOLDER" in err


def test_a_merged_export_answers_as_base_and_adapter(lora: Path, tmp_path: Path, capsys) -> None:
    assert main(["export", str(lora), str(tmp_path / "merged"), "--merge"]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "merged")
    assert replies(tmp_path / "merged") == replies(lora / "adapter")
    merged = LocalGenerator.load(tmp_path / "merged").score([TEXT])[0]
    beside = LocalGenerator.load(lora / "adapter").score([TEXT])[0]
    assert merged == pytest.approx(beside, abs=1e-5)
    card = (tmp_path / "merged" / "README.md").read_text()
    assert "| by | lora |" in card and "copy, reverse, upper" in card
    # Beside the adapter, in the run folder, where chat then finds it.
    assert main(["export", str(lora), "--merge", "--step", "9"]) == 1
    assert "no whole checkpoint of step 9" in capsys.readouterr().err
    assert main(["export", str(lora), str(tmp_path / "x"), "--merge", "--plain"]) == 2
    assert "exclude each other" in capsys.readouterr().err


def test_a_quantised_base_is_merged_where_it_was_measured_nearer(
    run_of: Callable[..., Path], tmp_path: Path, capsys: Any
) -> None:
    run = run_of("qlora", Lora(rank=4, quantize=Quantize.nf4))
    assert main(["export", str(run), str(tmp_path / "merged"), "--merge"]) == 0
    said = capsys.readouterr().err
    assert "merged into the dequantised NF4 weights, which is nearer" in said
    card = (tmp_path / "merged" / "README.md").read_text()
    figures = re.findall(r"\| merged into the (.*) weights \| loss ([\d.]+), .* by (\S+) on", card)
    assert [name for name, *_ in figures] == ["original", "dequantised NF4"]
    assert float(figures[1][2]) < float(figures[0][2]) / 100
    # What was written is what was measured.
    config = (tmp_path / "merged" / "config.json").read_text()
    assert "quantization" not in config
    assert main(["evaluate", f"model.path={tmp_path / 'merged'}", *data_of(run)]) == 0
    loss = re.search(r"all channels +([\d.]+)", capsys.readouterr().out).group(1)
    assert loss == figures[1][1]
    # The adapter is evaluated and served on the NF4 base that it was trained on.
    base = RunConfig.from_yaml((run / "config.yaml").read_text()).model.path
    given = ["--adapter", f"q={run}", f"model.path={base}", *data_of(run)]
    assert main(["evaluate", *given]) == 0
    found = re.search(r"all channels +[\d.]+ +([\d.]+)", capsys.readouterr().out).group(1)
    assert found == f"{last_loss(run):.4f}"
    merged, beside = (
        LocalGenerator.load(folder).score([TEXT])[0]
        for folder in (tmp_path / "merged", run / "adapter")
    )
    assert merged == pytest.approx(beside, abs=1e-4)


def test_new_tokens_are_served_and_merged(
    wide: Path, run_of: Callable[..., Path], lora: Path, tmp_path: Path, capsys: Any
) -> None:
    new = [f"<new{number}>" for number in range(5)]
    run = run_of("tokens", Lora(rank=4), add_tokens=tuple(new))
    assert main(["export", str(run), str(tmp_path / "merged"), "--merge"]) == 0
    beside = LocalGenerator.load(wide, adapters={"plain": lora, "new": run})
    merged = LocalGenerator.load(tmp_path / "merged")
    ids = merged.tokenizer("".join(new), add_special_tokens=False)["input_ids"]
    # The base has three rows that no token had.
    rows = len(LocalGenerator.load(wide).model.lm_head.weight)
    assert ids == list(range(rows - 3, rows + 2)) and merged.model.config.vocab_size == rows + 2
    speaks = beside._chosen(Sampling(adapter="new"))[1].tokenizer
    assert speaks("".join(new), add_special_tokens=False)["input_ids"] == ids
    text = [*TEXT, *ids, 7]
    beside.choose("new")
    assert main(["evaluate", f"model.path={wide}", *data_of(run), "--adapter", f"t={run}"]) == 2
    assert "model.add_tokens: is not set" in capsys.readouterr().err
    assert merged.score([text])[0] == pytest.approx(beside.score([text])[0], abs=1e-5)


def last_loss(run: Path) -> float:
    """Of the held-out rows, at the end of the training."""
    row = (run / "metrics.jsonl").read_text().splitlines()[-1]
    return float(re.findall(r'"eval/loss": ([\d.]+)', row)[0])


def data_of(run: Path) -> list[str]:
    """Words that give the data of a run."""
    data = RunConfig.from_yaml((run / "config.yaml").read_text()).data
    train = data.train if isinstance(data.train, str) else data.train[0]
    words = [f"data.train={train}", "data.max_length=64", "data.eval_fraction=0.1"]
    return [*words, "train.dtype=float32"]


@pytest.mark.slow
def test_what_cannot_be_merged_says_why(
    run_of: Callable[..., Path], tmp_path: Path, capsys: Any
) -> None:
    run = run_of("bottleneck", Bottleneck(reduction=8))
    assert main(["export", str(run), str(tmp_path / "merged"), "--merge"]) == 1
    assert "has a relu between its matrices" in capsys.readouterr().err
    assert not (tmp_path / "merged").exists()


def test_evaluate_has_a_column_for_each_adapter(
    wide: Path, lora: Path, other: Path, capsys: Any
) -> None:
    words = [f"model.path={wide}", *data_of(lora)]
    given = ["--adapter", f"one={lora}", f"--adapter=two={other}"]
    assert main(["evaluate", given[0], given[1], *words, given[2]]) == 0
    table = [line.split() for line in capsys.readouterr().out.splitlines() if "--" not in line]
    assert table[0] == ["channel", "(held-out", "loss)", "base", "one", "two"]
    losses = {row[0]: row[-3:] for row in table[1:]}
    assert losses.keys() >= {"copy", "reverse", "upper", "all"}
    # The base alone, by the engine.
    assert main(["evaluate", *words]) == 0
    alone = [line.split() for line in capsys.readouterr().out.splitlines() if "--" not in line]
    assert {row[0]: row[-1] for row in alone[1:]} == {k: v[0] for k, v in losses.items()}
    # At the end of its training each run had this loss.
    for column, run in ((1, lora), (2, other)):
        assert losses["all"][column] == f"{last_loss(run):.4f}"


@pytest.mark.slow
def test_an_ensemble_is_scored_and_answers(
    wide: Path, run_of: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    run = run_of("ensemble", PromptTuning(tokens=2, ensemble=2))
    given = ["--adapter", f"e={run}"]
    assert main(["evaluate", f"model.path={wide}", *data_of(run), *given]) == 0
    losses, accuracies = capsys.readouterr().out.strip().split("\n\n")
    first = re.split("  +", losses.splitlines()[0])
    assert first == ["channel (held-out loss)", "base", "e-0", "e-1", "e average"]
    second = re.split("  +", accuracies.splitlines()[0])
    assert second == ["channel (top-1 accuracy)", "e-0", "e-1", "e average", "e vote"]
    # Two prompts agree, or the average decides: the vote is the average.
    total = accuracies.splitlines()[-1].split()
    assert total[-1] == total[-2]
    code, told, _ = chat(monkeypatch, capsys, run, lines=ASKED)
    assert code == 0 and told == replies(run / "adapter" / "prompt-0")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--adapter"], "--adapter: needs a value"),
        (["--adapter", "x"], "write --adapter NAME=FOLDER"),
        (["--adapter", "x=/a", "--adapter", "x=/b"], "x is given twice"),
        (["--adaptor", "x=/a"], "did you mean --adapter?"),
    ],
)
def test_a_wrong_adapter_flag_is_explained(
    wide: Path, rows_file: Path, words: list[str], says: str, capsys: Any
) -> None:
    given = [f"model.path={wide}", f"data.train={rows_file}", *words]
    assert main(["evaluate", *given]) == 2
    assert says in capsys.readouterr().err


def test_an_adapter_of_another_base_is_refused(
    lora: Path, tmp_path: Path, builders: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
    base = builders.model(tmp_path / "base", seed=4, **sizes)
    for words in (["evaluate", f"model.path={base}", *data_of(lora)], ["chat", str(base)]):
        monkeypatch.setattr(sys, "stdin", io.StringIO("a\n"))
        assert main([*words, "--adapter", f"a={lora}"]) != 0
        assert "and " + str(base) + " is another model" in capsys.readouterr().err


def test_combine_writes_an_adapter_that_is_the_weighted_sum(
    wide: Path, lora: Path, other: Path, tmp_path: Path, capsys: Any
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    out = tmp_path / "both"
    given = [f"{lora}:0.75", f"{other / 'adapter'}:-0.5"]
    assert main(["combine", str(out), *given, "--method", "cat"]) == 0
    assert capsys.readouterr().out.strip() == str(out)
    models = {
        name: PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(wide), folder)
        for name, folder in (("a", lora / "adapter"), ("b", other / "adapter"), ("both", out))
    }
    layer = "base_model.model.model.layers.1.mlp.down_proj"
    delta = {n: m.get_submodule(layer).get_delta_weight("default") for n, m in models.items()}
    torch.testing.assert_close(delta["both"], 0.75 * delta["a"] - 0.5 * delta["b"])
    # It answers with the template of the training.
    assert len(replies(out)) == 2
    assert "cat of 2" in (out / "README.md").read_text()
    assert main(["combine", str(out), *given]) == 1
    assert "is already there" in capsys.readouterr().err
    assert main(["combine", str(tmp_path / "x"), str(lora), given[1]]) == 2
    assert f"{lora} has no weight: write {lora}:0.5" in capsys.readouterr().err
    assert main(["combine", str(tmp_path / "x"), *given, "--method", "ties"]) == 1
    assert "--density: ties keeps a part" in capsys.readouterr().err


def test_what_is_combined_of_adapters_of_an_nf4_base_stands_on_one(
    lora: Path, other: Path, tmp_path: Path
) -> None:
    for name, source in (("a", lora), ("b", other)):
        shutil.copytree(source / "adapter", tmp_path / name)
        facts = json.loads((tmp_path / name / "posttrain.json").read_text())
        facts["tuning"]["quantize"] = "nf4"
        (tmp_path / name / "posttrain.json").write_text(json.dumps(facts))
    notices: list[str] = []
    for name, second in (("same", tmp_path / "b"), ("mixed", other)):
        members = [(tmp_path / "a", 0.5), (second, 0.5)]
        combine_folders(tmp_path / name, members, Combination.cat, notice=notices.append)
        assert stood_on_nf4(tmp_path / name) == (name == "same")
    assert [line for line in notices if "NF4" in line] == [
        "some of the adapters were trained on a base in NF4, and others were not"
    ]


@pytest.mark.slow
def test_answers_before_and_after_come_from_one_base(lora: Path) -> None:
    from posttrain_dist.evaluation.answers import compare

    config = RunConfig.from_yaml((lora / "config.yaml").read_text())
    found = compare(replace(config, eval=replace(config.eval, samples=3)), lora)
    tokenizer = LocalGenerator.load(lora / "adapter")
    asked = [Prompt([{"role": "user", "content": row["prompt"]}]) for row in found["samples"]]
    sampling = Sampling(max_new_tokens=config.eval.max_new_tokens)
    assert [row["after"] for row in found["samples"]] == [
        reply.shown for reply in tokenizer.reply(asked, sampling)
    ]
    base = LocalGenerator.load(
        Path(config.model.path), tokenizer=tokenizer.tokenizer, end_token_ids=tokenizer.end_ids
    )
    assert [row["before"] for row in found["samples"]] == [
        reply.shown for reply in base.reply(asked, sampling)
    ]
