"""What comes out of a run that trains an adapter: a folder that plain peft puts on its base."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from posttrain_launch.cli import main

from posttrain_dist.checkpoint import store
from posttrain_dist.config import (
    Bottleneck,
    DataConfig,
    EvalConfig,
    Ia3,
    Lora,
    ModelConfig,
    Prefix,
    Prompt,
    PTuning,
    RunConfig,
    TrainConfig,
    complete,
)
from posttrain_dist.engine import AdamW, DeepSpeed, Single
from posttrain_dist.errors import CheckpointError, ConfigError, ModelError
from posttrain_dist.export import export_checkpoint
from posttrain_dist.files import read_object, read_rows
from posttrain_dist.metrics import LoggingConfig, WandbMode
from posttrain_dist.run import run
from posttrain_dist.train import train
from posttrain_dist.tuning.adapters.adapter_folder import adapter_parts, read_adapter
from posttrain_dist.tuning.base import Tuning
from posttrain_dist.tuning.lora import LoraInit
from posttrain_dist.tuning.saved_adapter import SavedAdapter

RATE = 3e-2


@pytest.fixture(scope="module")
def base(tiny_llama: Path, rows_file: Path) -> RunConfig:
    return complete(
        RunConfig(
            model=ModelConfig(path=str(tiny_llama)),
            data=DataConfig(train=str(rows_file), max_length=64),
            tuning=Lora(rank=4, alpha=6.0, rslora=True, targets=["q_proj", "down_proj"]),
            optimizer=AdamW(lr=RATE),
            engine=Single(),
            train=TrainConfig(steps=3, batch_size=4, save_every=2),
            eval=EvalConfig(generate_rows=1, samples=3, max_new_tokens=6),
            logging=LoggingConfig(wandb=WandbMode.off),
        )
    )


@pytest.fixture(scope="module")
def finished(base: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "lora"
    assert run(base, folder, progress=False).completed
    (folder / "config.yaml").write_text(base.to_yaml())
    return folder


def heldout_loss(run_folder: Path, base: Path, adapter: Path | None) -> float:
    """The loss of the held-out samples, each alone, by plain transformers and peft."""
    import peft
    import transformers

    model: Any = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if adapter is not None:
        model = peft.PeftModel.from_pretrained(model, adapter)
    return loss_of(model, run_folder)


def loss_of(model: Any, run_folder: Path) -> float:
    from posttrain_dist.data.prepared.arrays import Examples

    model.eval()
    examples = Examples.open(run_folder / "prepared", "eval")
    total = weight = 0.0
    for i in range(len(examples)):
        ids = torch.from_numpy(examples[i].input_ids_L.astype("int64"))
        with torch.no_grad():
            logits = model(input_ids=ids[None]).logits[0, -len(ids) : -1]
        nll = torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none")
        mask = torch.from_numpy(examples[i].weight_L[1:].copy())
        total, weight = total + float((nll * mask).sum()), weight + float(mask.sum())
    return total / weight


def trained_loss(run_folder: Path) -> float:
    return float(read_rows(run_folder / "metrics.jsonl")[-1]["eval/loss"])


def test_plain_peft_gives_the_loss_that_the_trainer_evaluated(
    finished: Path, tiny_llama: Path
) -> None:
    found = heldout_loss(finished, tiny_llama, finished / "adapter")
    assert found == pytest.approx(trained_loss(finished), rel=1e-6)
    assert heldout_loss(finished, tiny_llama, None) > 1.01 * found
    assert not (finished / "export").exists() and not (finished / ".rehearsal").exists()
    assert (finished / "FINISHED").is_file()


def test_base_and_adapter_answer_as_plain_peft_does(finished: Path, tiny_llama: Path) -> None:
    import peft
    import transformers

    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(finished / "adapter")
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    samples = json.loads((finished / "answers.json").read_text())["samples"]
    asked = [[{"role": "user", "content": sample["prompt"]}] for sample in samples]
    rows = [
        tokenizer.apply_chat_template(m, add_generation_prompt=True)["input_ids"] for m in asked
    ]

    def answers() -> list[str]:
        texts = []
        for ids in rows:
            made = model.generate(input_ids=torch.tensor([ids]), max_new_tokens=6, do_sample=False)
            texts.append(tokenizer.decode(made[0, len(ids) :], skip_special_tokens=True))
        return texts

    before = answers()
    model = peft.PeftModel.from_pretrained(model, finished / "adapter").eval()
    after = answers()
    assert [sample["before"] for sample in samples] == before
    assert [sample["after"] for sample in samples] == after != before


def test_the_folder_says_where_it_comes_from_and_serves_what_was_trained(
    finished: Path, tiny_llama: Path
) -> None:
    import transformers

    from posttrain_dist.tuning.adapters.base_digest import base_digest

    adapter = finished / "adapter"
    facts = read_object(adapter / "posttrain.json")
    assert (facts["method"], facts["step"], facts["run"]) == ("lora", 3, "lora")
    assert facts["tuning"]["rank"] == 4
    assert facts["base_digest"] == base_digest(tiny_llama)
    assert facts["channels"] == ["copy", "reverse", "upper"] and "peft" in facts["versions"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(adapter)
    original = transformers.AutoTokenizer.from_pretrained(tiny_llama)
    assert tokenizer.chat_template == original.chat_template
    assert tokenizer.get_vocab() == original.get_vocab()
    generation = transformers.GenerationConfig.from_pretrained(adapter)
    assert generation.eos_token_id == tokenizer.convert_tokens_to_ids("<|end|>")
    card = (adapter / "README.md").read_text()
    assert "| method | lora (rsLoRA) |" in card and "| effective scale | 3 (alpha 6 / sqrt" in card
    assert "--plain" in card and f"| base model | `{tiny_llama}` |" in card


def test_a_checkpoint_exports_what_the_run_did(finished: Path, tmp_path: Path) -> None:
    out = export_checkpoint(finished, tmp_path / "last")
    again, first = read_adapter(out), read_adapter(finished / "adapter")
    assert again.config == first.config and again.tensors.keys() == first.tensors.keys()
    assert all(torch.equal(again.tensors[name], first.tensors[name]) for name in first.tensors)
    for name in ("generation_config.json", "chat_template.jinja", "tokenizer.json"):
        assert (out / name).read_bytes() == (finished / "adapter" / name).read_bytes(), name
    earlier = read_adapter(export_checkpoint(finished, tmp_path / "two", step=2, dtype="bfloat16"))
    assert read_object(tmp_path / "two" / "posttrain.json")["step"] == 2
    assert {tensor.dtype for tensor in earlier.tensors.values()} == {torch.bfloat16}
    assert any(
        not torch.equal(earlier.tensors[name], tensor.bfloat16())
        for name, tensor in first.tensors.items()
    )


def test_plain_lora_of_rslora_is_the_same_model(
    finished: Path, tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "plain"
    assert main(["export", str(finished), str(out), "--plain"]) == 0
    assert capsys.readouterr().out == f"{out}\n"
    config = read_object(out / "adapter_config.json")
    assert (config["use_rslora"], config["lora_alpha"]) == (False, 12)
    loss = heldout_loss(finished, tiny_llama, out)
    assert loss == pytest.approx(trained_loss(finished), rel=1e-6)
    assert "--plain" not in (out / "README.md").read_text()


def test_the_wrong_run_for_plain(finished: Path, base: RunConfig, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "full")
    config = complete(RunConfig(model=base.model, data=base.data))
    (tmp_path / "full" / "config.yaml").write_text(config.to_yaml())
    with pytest.raises(ConfigError, match="--plain"):
        export_checkpoint(tmp_path / "full", tmp_path / "out", plain=True)


def test_a_run_goes_on_with_an_adapter(finished: Path, base: RunConfig, tmp_path: Path) -> None:
    """Its evaluation before the first step is the last one of the run that made the adapter."""
    config = replace(base, tuning=replace(base.tuning, init_from=str(finished)))
    shutil.copytree(finished / "prepared", tmp_path / "prepared")
    train(config, tmp_path)
    before = read_rows(tmp_path / "metrics.jsonl")[0]
    assert before["step"] == 0
    assert before["eval/loss"] == pytest.approx(trained_loss(finished), rel=1e-6)


def test_an_adapter_of_another_base_is_refused_before_a_model_is_loaded(
    finished: Path, base: RunConfig, builders: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from posttrain_dist import build
    from posttrain_dist.preflight import input_problems

    other = builders.model(tmp_path / "other", seed=1)
    tuning = replace(base.tuning, init_from=str(finished / "adapter"))
    config = replace(base, tuning=tuning, model=ModelConfig(path=str(other)))
    (problem,) = input_problems(config)
    assert isinstance(problem, ModelError) and "is another model" in problem.what
    (problem,) = input_problems(replace(base, tuning=replace(tuning, rank=8)))
    assert "has the rank 4, this tuning 8" in problem.what
    assert not input_problems(replace(base, tuning=tuning))
    shutil.copytree(finished / "prepared", tmp_path / "prepared")
    monkeypatch.setattr(build, "load_model", lambda *a, **k: pytest.fail("it was loaded"))
    with pytest.raises(ModelError, match="is another model"):
        train(config, tmp_path)


def test_new_tokens_are_the_same_where_a_run_goes_on(
    finished: Path, base: RunConfig, tmp_path: Path
) -> None:
    """Rows are taken by id."""
    from transformers import AutoTokenizer

    from posttrain_dist.build import build_policy
    from posttrain_dist.preflight import input_problems

    shutil.copytree(finished / "adapter", tmp_path / "adapter")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "adapter")
    tokenizer.add_tokens(["<b>", "<a>"])
    tokenizer.save_pretrained(tmp_path / "adapter")
    tuning = replace(base.tuning, init_from=str(tmp_path / "adapter"))
    model = replace(base.model, add_tokens=["<b>", "<a>"])
    assert not input_problems(replace(base, tuning=tuning, model=model))
    for tokens in ([], ["<a>", "<b>"], ["<x>", "<y>"]):
        config = replace(base, tuning=tuning, model=replace(model, add_tokens=tokens))
        (problem,) = input_problems(config)
        assert problem.where == "model.add_tokens"
        assert problem.fix == """set 'model.add_tokens=["<b>", "<a>"]'"""
        with pytest.raises(ConfigError, match="was trained with"):
            build_policy(config, None, torch.float32, [])


def test_what_cannot_be_saved_ends_the_run_at_its_first_step(
    finished: Path, base: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tuning that gives empty tensors, as of a sharded model that nobody gathered."""

    def emptied(self: Lora, kept: Any, network: Any) -> Any:
        saved = real(self, kept, network)
        tensors = {name: tensor[:0] for name, tensor in saved.tensors.items()}
        return SavedAdapter(saved.config, tensors)

    real = Lora.to_adapter
    monkeypatch.setattr(Lora, "to_adapter", emptied)
    shutil.copytree(finished / "prepared", tmp_path / "prepared")
    with pytest.raises(CheckpointError, match=r"lora_A.weight is empty"):
        train(base, tmp_path)
    rows = read_rows(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 1] and not store.checkpoints(tmp_path)
    assert not [p for p in tmp_path.iterdir() if "rehearsal" in p.name or p.name == "adapter"]


def test_a_base_that_changed_is_said_and_not_gone_on_with(
    finished: Path, tmp_path: Path, tiny_llama: Path
) -> None:
    from safetensors.torch import load_file, save_file

    moved = tmp_path / "base"
    shutil.copytree(tiny_llama, moved)
    shutil.copytree(finished, tmp_path / "run")
    config = (tmp_path / "run" / "config.yaml").read_text().replace(str(tiny_llama), str(moved))
    (tmp_path / "run" / "config.yaml").write_text(config)
    notices: list[str] = []
    export_checkpoint(tmp_path / "run", tmp_path / "same", notice=notices.append)
    assert notices == []
    tensors = load_file(moved / "model.safetensors")
    save_file({n: t + 1 for n, t in tensors.items()}, moved / "model.safetensors")
    out = export_checkpoint(tmp_path / "run", tmp_path / "out", notice=notices.append)
    assert len(notices) == 1 and "was changed since the training began" in notices[0]
    with pytest.raises(CheckpointError, match="beside another base model"):
        train(RunConfig.from_yaml(config), tmp_path / "run")
    facts = json.loads((finished / "adapter" / "posttrain.json").read_text())
    assert read_object(out / "posttrain.json")["base_digest"] == facts["base_digest"]


# ---------------------------------------------------------------------------- every method

METHODS: dict[str, Tuning] = {
    "dora": Lora(rank=4, dora=True),
    "pissa": Lora(rank=4, init=LoraInit.pissa),
    "head": Lora(rank=4, targets=["v_proj", "lm_head"], modules_to_save=["norm"]),
    "ia3": Ia3(),
    "prompt": Prompt(tokens=3),
    "ensemble": Prompt(tokens=3, ensemble=2),
    "p_tuning": PTuning(tokens=3, hidden_size=16),
    "prefix": Prefix(tokens=3),
}


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_plain_peft_gives_the_trained_loss_of_every_method(
    method: str, base: RunConfig, finished: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    config = replace(base, tuning=METHODS[method])
    shutil.copytree(finished / "prepared", tmp_path / "prepared")
    train(config, tmp_path)
    parts = adapter_parts(tmp_path)
    assert len(parts) == (2 if method == "ensemble" else 1)
    losses = [heldout_loss(tmp_path, tiny_llama, part) for part in parts]
    assert sum(losses) / len(losses) == pytest.approx(trained_loss(tmp_path), rel=1e-5)
    before = read_rows(tmp_path / "metrics.jsonl")[0]["eval/loss"]
    assert abs(trained_loss(tmp_path) - before) > 1e-3 * before
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    again = read_adapter(export_checkpoint(tmp_path, tmp_path / "again"))
    for name, tensor in read_adapter(tmp_path).tensors.items():
        torch.testing.assert_close(again.tensors[name], tensor, rtol=1e-6, atol=1e-7)


@pytest.mark.slow
def test_a_bottleneck_comes_back_as_it_was(base: RunConfig, finished: Path, tmp_path: Path) -> None:
    """In the file of the `adapters` library, which is no dependency: a second run reads it."""
    config = replace(base, tuning=Bottleneck(reduction=4))
    for name in ("first", "second"):
        shutil.copytree(finished / "prepared", tmp_path / name / "prepared")
    train(config, tmp_path / "first")
    adapter = tmp_path / "first" / "adapter"
    assert (adapter / "adapter.safetensors").is_file()
    assert "it cannot be merged" in (adapter / "README.md").read_text()
    tuning = Bottleneck(reduction=4, init_from=str(tmp_path / "first"))
    train(replace(config, tuning=tuning), tmp_path / "second")
    rows = [read_rows(tmp_path / name / "metrics.jsonl") for name in ("first", "second")]
    assert rows[1][0]["eval/loss"] == pytest.approx(rows[0][-1]["eval/loss"], rel=1e-6)
    assert rows[1][0]["eval/loss"] != pytest.approx(rows[0][0]["eval/loss"], rel=1e-3)


@pytest.mark.slow
def test_two_ranks_of_every_stage_write_the_adapter_of_one_process(
    base: RunConfig, finished: Path, tmp_path: Path, run_workers: Any
) -> None:
    folders = []
    for stage in range(4):
        engine = DeepSpeed(stage=stage, persistence_threshold=0)
        train_config = replace(base.train, micro_batch_size=1, batch_size=4)
        folder = tmp_path / f"zero{stage}"
        shutil.copytree(finished / "prepared", folder / "prepared")
        config = replace(base, engine=engine, train=train_config)
        (folder / "config.yaml").write_text(config.to_yaml())
        folders.append(folder)
    run_workers("train_runs.py", 2, *folders)
    wanted = read_adapter(finished / "adapter")
    for folder in folders:
        found = read_adapter(folder / "adapter")
        assert found.config == wanted.config
        for name, tensor in wanted.tensors.items():
            torch.testing.assert_close(found.tensors[name], tensor, rtol=2e-4, atol=2e-5)
        streamed = read_adapter(export_checkpoint(folder, folder / "again"))
        assert all(torch.equal(streamed.tensors[n], t) for n, t in found.tensors.items())


@pytest.mark.parametrize("tied", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_lines_of_the_card_load_an_adapter_with_new_tokens(
    tied: bool, base: RunConfig, builders: Any, tmp_path: Path
) -> None:
    """The trained loss comes out of what the card says, and the tokenizer has the new tokens."""
    import transformers

    from posttrain_dist.prepare import prepare

    model = builders.model(tmp_path / "model", tie_word_embeddings=tied)
    rows = [builders.chat(f"say {i}", f"<new> {i} <new>", "new") for i in range(60)]
    data = DataConfig(train=str(builders.write(tmp_path / "rows.jsonl", rows)), max_length=64)
    config = replace(
        base,
        data=data,
        model=ModelConfig(path=str(model), add_tokens=["<new>", "<a>", "<b>", "<c>", "<d>"]),
    )
    config = replace(config, train=replace(base.train, steps=2, save_every=None))
    prepare(config, tmp_path / "prepared")
    train(config, tmp_path)
    adapter = tmp_path / "adapter"
    tokenizer = transformers.AutoTokenizer.from_pretrained(adapter)
    assert tokenizer.encode("<new>") == [tokenizer.convert_tokens_to_ids("<new>")]
    card = (adapter / "README.md").read_text()
    code = card.partition("```python\n")[2].partition("```")[0]
    assert "base.resize_token_embeddings(" in code
    code = code.replace("<this folder>", str(adapter)).replace('dtype="auto"', 'dtype="float32"')
    names: dict[str, Any] = {}
    exec(code, names)
    loss = loss_of(names["model"], tmp_path)
    assert loss == pytest.approx(trained_loss(tmp_path), rel=1e-6)
