"""Held-out losses of adapters on one loaded base, against plain `peft` on each row alone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from posttrain_dist.config import (
    DataConfig,
    Dtype,
    ModelConfig,
    RunConfig,
    TrainConfig,
    complete,
)
from posttrain_dist.data.prepared.arrays import Examples
from posttrain_dist.errors import ConfigError, ModelError
from posttrain_dist.evaluation import merge_choice
from posttrain_dist.evaluation.adapter_losses import HeldOut, evaluate_adapters
from posttrain_dist.evaluation.merge_choice import choose_weights
from posttrain_dist.prepare import prepare
from posttrain_dist.tuning.adapters.merged_tensors import MergeInto
from posttrain_dist.tuning.base import Quantize, fill_parameters
from posttrain_dist.tuning.bottleneck import Bottleneck
from posttrain_dist.tuning.lora import Lora


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory, builders: Any) -> Path:
    """A base whose rows are blocks of NF4."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
    return builders.model(tmp_path_factory.mktemp("wide"), **sizes)


def config_of(model: Path, rows: Path, **changes: Any) -> RunConfig:
    return complete(
        RunConfig(
            model=ModelConfig(path=str(model)),
            data=DataConfig(train=str(rows), max_length=96, eval_fraction=0.2),
            train=TrainConfig(steps=1, dtype=Dtype.float32),
            **changes,
        )
    )


@pytest.fixture(scope="module")
def config(wide: Path, rows_file: Path) -> RunConfig:
    return config_of(wide, rows_file)


@pytest.fixture(scope="module")
def prepared(config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prepared")
    prepare(config, folder)
    return folder


@pytest.fixture(scope="module")
def adapter(wide: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """adapter(name, config): a random adapter, made and saved by plain `peft`."""
    from peft import get_peft_model

    root = tmp_path_factory.mktemp("adapters")

    def make(name: str, peft_config: Any) -> Path:
        torch.manual_seed(len(name))
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(wide), peft_config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
        model.save_pretrained(root / name)
        return root / name

    return make


def logits_by_peft(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """[L, V] of a row alone, behind whatever virtual tokens there are."""
    with torch.no_grad():
        return model(input_ids=ids[None], use_cache=False).logits[0, -len(ids) :]


def by_peft(wide: Path, prepared: Path, folders: list[Path]) -> dict[str, Any]:
    """Loss and accuracy of the mean of several models' probabilities, row by row."""
    from peft import PeftModel

    models = [AutoModelForCausalLM.from_pretrained(wide).eval() for _ in folders or [None]]
    loaded = [PeftModel.from_pretrained(m, f).eval() for m, f in zip(models, folders, strict=False)]
    sums: dict[str, list[float]] = {}
    votes = [0, 0]
    examples = Examples.open(prepared, "eval")
    for i in range(len(examples)):
        example = examples[i]
        ids = torch.tensor(example.input_ids_L.tolist())
        weight = torch.tensor(example.weight_L.tolist())[1:]
        log_p = torch.stack(
            [logits_by_peft(m, ids)[:-1].log_softmax(-1) for m in (loaded or models)]
        )
        mean = log_p.exp().mean(0)
        nll = -mean[range(len(ids) - 1), ids[1:]].log()
        row = sums.setdefault(list(examples.channels)[example.channel], [0, 0, 0, 0])
        row[0] += float((nll * weight).sum())
        row[1] += float(weight.sum())
        row[2] += float(((mean.argmax(-1) == ids[1:]) & (weight > 0)).sum())
        row[3] += float((weight > 0).sum())
        for place in (weight > 0).nonzero()[:, 0].tolist():
            tops = log_p[:, place].argmax(-1).tolist()
            best = max(set(tops), key=lambda token: (tops.count(token), float(mean[place, token])))
            votes[0] += best == int(ids[1:][place])
            votes[1] += 1
    total = [sum(column) for column in zip(*sums.values(), strict=True)]
    return {
        "loss": total[0] / total[1],
        "accuracy": total[2] / total[3],
        "channels": {channel: row[0] / row[1] for channel, row in sums.items()},
        "vote": votes[0] / votes[1],
    }


def assert_equal(found: dict[str, Any], expected: dict[str, Any], name: str) -> None:
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5), name
    assert found["accuracy"] == pytest.approx(expected["accuracy"], abs=1e-9), name
    assert found["channels"] == pytest.approx(expected["channels"], rel=1e-5), name


def test_each_adapter_scores_as_in_plain_peft(
    wide: Path, config: RunConfig, prepared: Path, adapter: Callable[..., Path], tmp_path: Path
) -> None:
    from peft import IA3Config, LoraConfig, PrefixTuningConfig

    task = {"task_type": "CAUSAL_LM"}
    feedforward = {"feedforward_modules": ["down_proj"], **task}
    saved = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head", "norm"], **task)
    folders = {
        "saved": adapter(
            "saved", saved
        ),  # all that end in norm, for peft; writes into the base, which the next one needs
        "lora": adapter("lora", LoraConfig(r=4, target_modules=["q_proj", "up_proj"], **task)),
        "dora": adapter("dora", LoraConfig(r=2, use_dora=True, target_modules=["o_proj"], **task)),
        "ia3": adapter("ia3", IA3Config(target_modules=["k_proj", "down_proj"], **feedforward)),
        "prefix": adapter("prefix", PrefixTuningConfig(num_virtual_tokens=3, **task)),
    }
    results = evaluate_adapters(config, prepared, folders)
    assert list(results) == ["none", *folders]
    expected = {
        name: by_peft(wide, prepared, [folders[name]] if name in folders else [])
        for name in results
    }
    for name, found in results.items():
        assert_equal(found, expected[name], name)
    assert len({round(found["loss"], 4) for found in results.values()}) == len(results)


def test_an_ensemble_gives_each_prompts_score_the_vote_and_the_average(
    wide: Path, config: RunConfig, prepared: Path, adapter: Callable[..., Path]
) -> None:
    from peft import PromptTuningConfig

    prompt = PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    folders = [adapter(f"run/prompt-{n}{'x' * n}", prompt) for n in range(3)]
    for number, folder in enumerate(folders):
        folder.rename(folder.parent / f"prompt-{number}")
    folders = [folder.parent / f"prompt-{number}" for number, folder in enumerate(folders)]
    results = evaluate_adapters(config, prepared, {"e": folders[0].parent})
    assert list(results) == ["none", "e-0", "e-1", "e-2", "e average", "e vote"]
    for number, folder in enumerate(folders):
        assert_equal(results[f"e-{number}"], by_peft(wide, prepared, [folder]), folder.name)
    together = by_peft(wide, prepared, folders)
    assert_equal(results["e average"], together, "average")
    assert results["e vote"]["accuracy"] == pytest.approx(together["vote"], abs=1e-9)
    assert results["e vote"]["loss"] is None
    # A mean of probabilities is no worse than the mean of the losses.
    assert together["loss"] < sum(results[f"e-{n}"]["loss"] for n in range(3)) / 3


def test_new_tokens_of_an_adapter_are_named_where_they_are_not_added(
    wide: Path, config: RunConfig, prepared: Path, adapter: Callable[..., Path]
) -> None:
    """Also in a model that has unused rows for them, where no size differs."""
    from peft import LoraConfig
    from tokenizers import AddedToken
    from transformers import AutoTokenizer

    targets = {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}
    folder = adapter("new", LoraConfig(r=2, task_type="CAUSAL_LM", **targets))
    tokenizer = AutoTokenizer.from_pretrained(wide)
    tokenizer.add_tokens([AddedToken("<b>"), AddedToken("<a>")])
    tokenizer.save_pretrained(folder)
    for tokens in ([], ["<a>", "<b>"], ["<b>"]):
        model = replace(config.model, add_tokens=tokens)
        with pytest.raises(ConfigError, match=r"model\.add_tokens: is") as caught:
            evaluate_adapters(replace(config, model=model), prepared, {"new": folder})
        assert caught.value.fix == """set 'model.add_tokens=["<b>", "<a>"]'"""
    added = replace(config, model=replace(config.model, add_tokens=["<b>", "<a>"]))
    results = evaluate_adapters(added, prepared, {"new": folder})
    assert_equal(results["new"], by_peft(wide, prepared, [folder]), "new")


def test_what_peft_alone_can_do_is_refused_by_the_folders_name(
    config: RunConfig, prepared: Path, adapter: Callable[..., Path]
) -> None:
    """No key of the config helps there, so none is named."""
    from peft import LoraConfig

    task = {"r": 2, "task_type": "CAUSAL_LM"}
    cases = {
        "of 2 tokens that the base model has, such as": LoraConfig(
            target_modules=["q_proj"], trainable_token_indices=[5, 100], **task
        ),
        "cannot be evaluated: 'embed_tokens' is no linear layer": LoraConfig(
            target_modules=["embed_tokens"], **task
        ),
    }
    for number, (says, peft_config) in enumerate(cases.items()):
        folder = adapter(f"peft{number}", peft_config)
        with pytest.raises(ModelError, match=says) as caught:
            evaluate_adapters(config, prepared, {"p": folder})
        assert caught.value.where == str(folder) and "posttrain chat" in caught.value.fix


def test_adapters_with_and_without_new_tokens_are_scored_side_by_side(
    wide: Path, config: RunConfig, prepared: Path, adapter: Callable[..., Path], tmp_path: Path
) -> None:
    from peft import LoraConfig
    from transformers import AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(wide)
    tokenizer = AutoTokenizer.from_pretrained(wide)
    first = len(tokenizer)
    with torch.no_grad():
        for table in (model.get_input_embeddings(), model.get_output_embeddings()):
            table.weight[first : first + 2] = table.weight[:first].mean(0)
    model.save_pretrained(tmp_path / "grown")
    ids = [first, first + 1]
    rows = LoraConfig(
        r=2,
        target_modules=["q_proj"],
        trainable_token_indices={"embed_tokens": ids, "lm_head": ids},
        task_type="CAUSAL_LM",
    )
    plain = LoraConfig(r=4, target_modules=["v_proj"], task_type="CAUSAL_LM")
    folders = {"rows": adapter("rows", rows), "plain": adapter("plain", plain)}
    added = replace(config, model=replace(config.model, add_tokens=["<b>", "<a>"]))
    results = evaluate_adapters(added, prepared, folders)
    assert_equal(results["none"], by_peft(tmp_path / "grown", prepared, []), "none")
    for name, folder in folders.items():
        assert_equal(results[name], by_peft(tmp_path / "grown", prepared, [folder]), name)


def test_who_stands_on_another_base_than_in_training_is_said(
    config: RunConfig, prepared: Path, adapter: Callable[..., Path], tmp_path: Path
) -> None:
    """One base is loaded for all: in NF4 only if all were trained so."""
    from peft import LoraConfig

    from posttrain_dist.evaluation.chat_generator import load_generator

    plain = adapter("one", LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    quantized = tmp_path / "quantized"
    shutil.copytree(plain, quantized)
    (quantized / "posttrain.json").write_text(json.dumps({"tuning": {"quantize": "nf4"}}))
    nf4 = replace(config, tuning=Lora(quantize=Quantize.nf4))
    cases = [
        (config, {"p": plain, "q": quantized}, "q: trained beside NF4, and here on unquantised"),
        (config, {"q": quantized}, ""),
        (config, {"p": plain}, ""),
        (nf4, {"p": plain, "q": quantized}, "p: trained beside unquantised weights, and here on"),
    ]
    for chosen, folders, says in cases:
        for asked in (
            partial(evaluate_adapters, chosen, prepared),
            partial(load_generator, Path(config.model.path)),
        ):
            if asked.func is load_generator and chosen is nf4:
                continue  # it knows no config
            notices: list[str] = []
            asked(folders, notice=notices.append)
            about = [line for line in notices if "beside" in line]
            assert len(about) == bool(says)
            assert says in "".join(about)


def random_kept(tuning: Any, model: Any) -> dict[str, torch.Tensor]:
    """What a training might have made of a tuning's tensors."""
    torch.manual_seed(3)
    tuning.attach(model)
    return {
        name: parameter.detach() + torch.randn_like(parameter) * 0.05
        for name, parameter in model.named_parameters()
        if tuning.kept(name)
    }


def test_the_weights_that_take_in_an_adapter_are_chosen_by_measurement(
    config: RunConfig, prepared: Path
) -> None:
    tuning = Lora(rank=4, quantize=Quantize.nf4)
    nf4 = replace(config, tuning=tuning)
    model = HeldOut(nf4, prepared).load_model(nf4=False)
    kept = random_kept(Lora(rank=4), model)
    choice = choose_weights(nf4, prepared, kept, torch.float32)
    # In float32, what NF4 made of the weights, with the change added, is the same model.
    assert choice.into is MergeInto.dequantised
    differences = {
        name: float(value.rpartition("differs by ")[2].split()[0])
        for name, value in choice.facts.items()
        if "differs by" in value
    }
    assert differences["merged into the dequantised NF4 weights"] < 1e-4
    # The other: the 16-bit base + adapter, which evaluation measures by another path.
    fill_parameters(model, kept)
    heldout = HeldOut(nf4, prepared)
    loss = heldout.measure(heldout.policy(model, Lora(rank=4)))["loss"]
    assert f"loss {loss:.4f}" in choice.facts["merged into the original weights"]
    assert differences["merged into the original weights"] > 0.01
    assert "which is nearer" in choice.text


def test_what_cannot_be_measured_goes_into_the_weights_of_the_training(
    config: RunConfig, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nf4 = replace(config, tuning=Lora(quantize=Quantize.nf4))
    choice = choose_weights(nf4, tmp_path / "gone", {}, torch.float32)
    assert choice.into is MergeInto.dequantised and "no held-out rows" in choice.text
    monkeypatch.setattr(merge_choice, "_available_bytes", lambda: 1000.0)
    choice = choose_weights(nf4, prepared, {}, torch.float32)
    assert choice.into is MergeInto.dequantised and "no room in memory" in choice.text
    assert "not measured: the base has no room" in choice.facts["merged into"]


def test_a_bottleneck_is_loaded_by_its_own_code(
    wide: Path, config: RunConfig, prepared: Path, tmp_path: Path
) -> None:
    from posttrain_dist.evaluation.chat_generator import load_generator
    from posttrain_dist.generation.base import Sampling

    folders = {}
    model = AutoModelForCausalLM.from_pretrained(wide).eval()
    network = model.config.to_dict()
    kept = random_kept(Bottleneck(reduction=8), model)
    for number in range(2):
        changed = {name: tensor * (1 + number) for name, tensor in kept.items()}
        saved = Bottleneck(reduction=8).to_adapter(changed, network)
        folders[f"n{number}"] = write_adapter(tmp_path / str(number), saved)
    results = evaluate_adapters(config, prepared, folders)
    ids = [5, 80, 91, 7, 120]
    generator = load_generator(wide, folders)
    alone = load_generator(wide).score([ids])
    scores = {}
    for name in ["n0", "n1", "none", "n0"]:
        generator.choose(name)
        scores[name] = generator.score([ids])[0]
        generator.generate([ids], Sampling(max_new_tokens=2, adapter=name))
    assert scores["none"] == alone[0]
    for number in range(2):
        fill_parameters(model, {name: t * (1 + number) for name, t in kept.items()})
        logits = logits_by_peft(model, torch.tensor(ids))[:-1].log_softmax(-1)
        expected = logits[range(len(ids) - 1), ids[1:]].tolist()
        assert scores[f"n{number}"] == pytest.approx(expected, abs=1e-5)
    assert len({round(found["loss"], 4) for found in results.values()}) == 3


def write_adapter(folder: Path, saved: Any) -> Path:
    from safetensors.torch import save_file

    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(saved.config))
    save_file(
        {name: t.detach().contiguous() for name, t in saved.tensors.items()},
        folder / "adapter.safetensors",
    )
    return folder
