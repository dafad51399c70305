"""What an evaluation of adapters refuses or tells: tokens, names, methods, bases in NF4."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from adapter_scores import assert_equal, by_peft
from transformers import AutoModelForCausalLM

from posttrain_dist.config import (
    ModelConfig,
    RunConfig,
)
from posttrain_dist.errors import ConfigError, ModelError
from posttrain_dist.evaluation.adapter_losses import HeldOut, evaluate_adapters
from posttrain_dist.evaluation.chat_generator import load_generator
from posttrain_dist.evaluation.heldout import evaluate
from posttrain_dist.generation.local import LocalGenerator
from posttrain_dist.generation.local_folder import load_model
from posttrain_dist.preflight import input_problems
from posttrain_dist.tuning.base import Quantize
from posttrain_dist.tuning.lora import Lora


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


def test_a_base_that_is_stored_in_nf4_is_evaluated_whatever_the_tuning(
    wide: Path, config: RunConfig, prepared: Path, adapter: Callable[..., Path], tmp_path: Path
) -> None:
    """Nothing is trained there. NF4 of NF4 is itself, so the base may be quantised as it loads."""
    from peft import LoraConfig
    from transformers import BitsAndBytesConfig

    stored = shutil.copytree(wide, tmp_path / "stored")
    (stored / "model.safetensors").unlink()
    nf4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    AutoModelForCausalLM.from_pretrained(
        wide, quantization_config=BitsAndBytesConfig(**nf4), device_map={"": "cpu"}
    ).save_pretrained(stored)
    asked = replace(config, model=ModelConfig(path=str(stored)))
    assert input_problems(asked, "evaluate") == []
    heldout = HeldOut(config, prepared)
    expected = heldout.measure(heldout.policy(heldout.load_model(nf4=True), None))
    assert_equal(evaluate(asked, prepared), expected, "base")
    folder = adapter("on", LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    results = evaluate_adapters(asked, prepared, {"a": folder})
    assert_equal(results["none"], expected, "none")
    # bitsandbytes repacks weights on some CPUs, and peft's DoRA then reads their bytes wrongly.
    dora = LoraConfig(r=2, use_dora=True, target_modules=["q_proj"], task_type="CAUSAL_LM")
    served = load_generator(stored, {"d": adapter("dora-on", dora)})
    quantized = LocalGenerator(load_model(wide, nf4=True), served.tokenizer)
    quantized.add_adapter("d", adapter("dora-on", dora))
    quantized.choose("d")
    assert served.score([[5, 80, 91, 7, 120]])[0] == pytest.approx(
        quantized.score([[5, 80, 91, 7, 120]])[0], abs=1e-5
    )
    four_bit = [m for m in served.model.modules() if hasattr(m, "support_avx512bf16_for_cpu")]
    assert four_bit and not any(m.support_avx512bf16_for_cpu for m in four_bit)
    assert results["a"]["loss"] != pytest.approx(expected["loss"], rel=1e-4)


def test_a_name_stands_for_one_adapter(
    config: RunConfig, prepared: Path, adapter: Callable[..., Path], tmp_path: Path
) -> None:
    from peft import LoraConfig

    folder = adapter("named", LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    for number in range(2):
        shutil.copytree(folder, tmp_path / "ensemble" / f"prompt-{number}")
    ensemble = tmp_path / "ensemble"
    for adapters in (
        {"none": folder},
        {"base": folder},
        {"e vote": folder},
        {"e": ensemble, "e-1": folder},
        {"e-1": folder, "e": ensemble},
    ):
        for ask in (
            partial(evaluate_adapters, config, prepared),
            partial(load_generator, Path(config.model.path)),
        ):
            with pytest.raises(ConfigError, match="is no free name of an adapter"):
                ask(adapters)


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
