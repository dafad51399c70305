"""Combined adapters against `add_weighted_adapter` of `peft`, and against the sum itself."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from posttrain_dist.errors import ConfigError, ModelError
from posttrain_dist.tuning.adapters.combine import Combination, WeightedAdapter, combine
from posttrain_dist.tuning.saved_adapter import SavedAdapter

WEIGHTS = [0.7, -0.4, 1.3]


@dataclass
class Made:
    model: Any  # of peft, with three adapters
    adapters: list[WeightedAdapter]


def make(targets: list[str], rslora: bool = False) -> Made:
    """Three random adapters of different scales on a small stack of linears."""
    import peft

    torch.manual_seed(0)
    base = torch.nn.Sequential()
    for number, name in enumerate(("first", "second")):
        base.add_module(name, torch.nn.Linear(6 + number, 7 + number))
    model: Any = None
    names = ["a", "b", "c"]
    for number, name in enumerate(names):
        config = peft.LoraConfig(
            r=4, lora_alpha=2 + 3 * number, target_modules=targets, use_rslora=rslora
        )
        if model is None:
            model = peft.get_peft_model(base, config, adapter_name=name)
        else:
            model.add_adapter(name, config)
    for key, parameter in model.named_parameters():
        if "lora_" in key:
            parameter.data = torch.randn_like(parameter)
    adapters = []
    for name, weight in zip(names, WEIGHTS, strict=True):
        config = model.peft_config[name].to_dict()
        config["peft_type"] = "LORA"
        tensors = peft.get_peft_model_state_dict(model, adapter_name=name)
        adapters.append(WeightedAdapter(Path(name), SavedAdapter(config, tensors), weight))
    return Made(model, adapters)


def of_peft(made: Made, combination: str, density: float | None, seed: int) -> dict[str, Any]:
    import peft

    inject = made.model.base_model.inject_adapter

    def inject_and_seed(*args: Any, **options: Any) -> None:  # making layers draws numbers, too
        inject(*args, **options)
        torch.manual_seed(seed)

    made.model.base_model.inject_adapter = inject_and_seed
    made.model.add_weighted_adapter(
        ["a", "b", "c"], WEIGHTS, "new", combination_type=combination, density=density
    )
    return peft.get_peft_model_state_dict(made.model, adapter_name="new")


@pytest.mark.parametrize("combination", list(Combination))
def test_a_combination_is_that_of_peft(combination: Combination) -> None:
    # Where entries are drawn, one layer: peft draws them in the order of its modules.
    made = make(["second"] if "dare" in combination.name else ["first", "second"])
    density = 0.5 if combination.prunes else None
    found = combine(made.adapters, combination, density=density, seed=5)
    torch.manual_seed(11)  # the seed decides, not the state of torch
    state = torch.random.get_rng_state()
    again = combine(made.adapters, combination, density=density, seed=5)
    assert torch.equal(state, torch.random.get_rng_state())
    expected = of_peft(made, combination.name, density, 5)
    assert sorted(found.tensors) == sorted(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(found.tensors[name], tensor, rtol=1e-6, atol=1e-6)
        assert torch.equal(found.tensors[name], again.tensors[name])
    config = made.model.peft_config["new"]
    assert (found.config["r"], found.config["lora_alpha"]) == (config.r, config.lora_alpha)
    if combination.prunes:
        assert any(bool((tensor == 0).any()) for tensor in found.tensors.values())


def test_cat_is_the_weighted_sum_of_the_changes() -> None:
    made = make(["first", "second"], rslora=True)
    found = combine(made.adapters, Combination.cat)
    assert found.config["r"] == found.config["lora_alpha"] == 12
    assert not found.config["use_rslora"]
    for layer in ("first", "second"):
        a, b = (f"base_model.model.{layer}.lora_{side}.weight" for side in "AB")
        expected = sum(
            weight * (2 + 3 * number) / 2 * adapter.saved.tensors[b] @ adapter.saved.tensors[a]
            for number, (weight, adapter) in enumerate(zip(WEIGHTS, made.adapters, strict=True))
        )
        torch.testing.assert_close(found.tensors[b] @ found.tensors[a], expected)


def changed(adapter: WeightedAdapter, **config: Any) -> WeightedAdapter:
    saved = SavedAdapter({**adapter.saved.config, **config}, adapter.saved.tensors)
    return adapter._replace(saved=saved)


def test_what_cannot_be_combined_is_refused_with_its_reason() -> None:
    first, second, _ = make(["first", "second"]).adapters
    other = make(["first"]).adapters[1]
    linear, ties = Combination.linear, Combination.ties
    for adapters, says in (
        ([first, changed(second, peft_type="IA3")], "b: is IA3, and only LoRA"),
        ([changed(first, use_dora=True), second], "a: is no plain LoRA: it has use_dora"),
        ([changed(first, bias="all"), second], "a: is no plain LoRA: it has bias='all'"),
        ([first, changed(second, init_lora_weights="pissa")], "it has init_lora_weights='pissa'"),
        ([first, changed(second, r=8)], "b: has the rank 8, and a has 4"),
        ([first, other], "b: adapts other layers than a: .*second"),
    ):
        with pytest.raises(ModelError, match=says):
            combine(adapters, linear)
    for options, says in (
        ({"combination": linear, "density": 0.5}, "--density: linear keeps every entry"),
        ({"combination": ties}, "--density: ties keeps a part"),
        ({"combination": ties, "density": 1.5}, "--density: is 1.5, must be"),
    ):
        with pytest.raises(ConfigError, match=says):
            combine([first, second], **options)
    with pytest.raises(ConfigError, match="one adapter is no combination"):
        combine([first], linear)
    with pytest.raises(ConfigError, match="a: has the weight 0"):
        combine([first._replace(weight=0.0), second], linear)
