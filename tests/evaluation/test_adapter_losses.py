"""Held-out losses of adapters on one loaded base, against plain `peft` on each row alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_scores import assert_equal, by_peft, logits_by_peft
from transformers import AutoModelForCausalLM

from posttrain_dist.config import (
    RunConfig,
)
from posttrain_dist.evaluation import merge_choice
from posttrain_dist.evaluation.adapter_losses import HeldOut, evaluate_adapters
from posttrain_dist.evaluation.merge_choice import choose_weights
from posttrain_dist.tuning.adapters.merged_tensors import MergeInto
from posttrain_dist.tuning.base import Quantize, fill_parameters
from posttrain_dist.tuning.bottleneck import Bottleneck
from posttrain_dist.tuning.lora import Lora


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
