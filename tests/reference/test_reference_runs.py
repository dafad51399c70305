"""Whole trainings with each reference: they start at it, agree with each other, and go on."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from preference_runs import losses, notices, pairs_config, trained, write_pairs
from safetensors.torch import load_file, save_file

from posttrain_dist.checkpoint import store
from posttrain_dist.config import Full, Lora, RunConfig
from posttrain_dist.errors import CheckpointError, ConfigError, ModelError, TrainingError
from posttrain_dist.objectives.preference.dpo import Dpo
from posttrain_dist.objectives.preference.kto import Kto
from posttrain_dist.objectives.reference_choice import Reference
from posttrain_dist.reference import open_reference
from posttrain_dist.train import train


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("pairs") / "pairs.jsonl")


def lora_config(
    tiny_llama: Path, rows: Path, reference: Reference, steps: int = 4, **objective: object
) -> RunConfig:
    dpo = Dpo(reference=reference, **objective)  # type: ignore[arg-type]
    train = {"steps": steps, "save_every": 2}
    return pairs_config(tiny_llama, rows, dpo, tuning=Lora(rank=4), train=train)


def test_the_three_references_of_an_adapter_agree(
    tmp_path: Path, tiny_llama: Path, rows: Path
) -> None:
    found = {}
    for reference in (Reference.auto, Reference.precomputed, Reference.frozen):
        folder = tmp_path / reference.name
        metrics = trained(lora_config(tiny_llama, rows, reference), folder)
        found[reference.name] = losses(metrics)
        assert metrics[0]["eval/loss"] == pytest.approx(math.log(2), abs=2e-6)
        told = [line for line in notices(folder) if "the reference is" in line]
        assert len(told) == 1 and str(tiny_llama) in told[0]
    live = found["auto"]
    assert "objective.reference=adapter_off" in notices(tmp_path / "auto")[-1]
    assert live[0] == pytest.approx(math.log(2), abs=1e-7)
    assert abs(live[-1] - live[0]) > 0.01  # it moved
    assert found["frozen"] == live
    assert found["precomputed"] == pytest.approx(live, abs=2e-5)


def test_a_run_goes_on_by_what_it_computed(
    tmp_path: Path, tiny_llama: Path, rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dpo = Dpo()
    config = pairs_config(tiny_llama, rows, dpo, train={"steps": 4, "save_every": 2})
    folder = tmp_path / "run"
    whole = losses(trained(config, folder))
    values = np.load(folder / open_reference.FOLDER / "logprob.npy")

    def refuse(*_: object) -> None:
        raise AssertionError("nothing is to be computed again")

    monkeypatch.setattr(open_reference, "_score_policy", refuse)
    (store.whole_checkpoints(folder)[-1] / store.MANIFEST).unlink()
    train(config, folder)
    assert losses([json.loads(s) for s in (folder / "metrics.jsonl").open()]) == whole
    assert np.array_equal(
        np.load(folder / open_reference.FOLDER / "logprob.npy"), values, equal_nan=True
    )
    # Another run on the same data takes what this one computed.
    again = tmp_path / "again"
    assert losses(trained(config, again)) == whole
    assert any("as an earlier run computed them" in line for line in notices(again))


def test_another_reference_does_not_go_on_with_a_checkpoint(
    tmp_path: Path, tiny_llama: Path, rows: Path, builders
) -> None:
    folder = tmp_path / "run"
    trained(lora_config(tiny_llama, rows, Reference.auto, steps=2), folder)
    other = builders.model(tmp_path / "other", seed=1)
    changed = lora_config(tiny_llama, rows, Reference.auto, reference_model=str(other))
    with pytest.raises(CheckpointError, match="against another reference model"):
        train(changed, folder)
    # The same reference, had in another way, goes on.
    train(lora_config(tiny_llama, rows, Reference.frozen), folder)
    assert len(losses([json.loads(s) for s in (folder / "metrics.jsonl").open()])) == 4


def test_an_adapter_that_goes_on_starts_at_itself(
    tmp_path: Path, tiny_llama: Path, rows: Path
) -> None:
    first = lora_config(tiny_llama, rows, Reference.auto, steps=2)
    first = replace(first, checkpoint=replace(first.checkpoint, export=True))
    trained(first, tmp_path / "first")
    tuning = Lora(rank=4, init_from=str(tmp_path / "first" / "adapter"))
    config = pairs_config(tiny_llama, rows, Dpo(), tuning=tuning, train={"steps": 1})
    start = losses(trained(config, tmp_path / "second"))[0]
    assert start == pytest.approx(math.log(2), abs=1e-5)
    line = next(line for line in notices(tmp_path / "second") if "the reference is" in line)
    assert f"with the adapter {tuning.init_from}" in line and "precomputed" in line
    # The base, if it is named: the policy does not start at it.
    off = replace(config, objective=Dpo(reference=Reference.adapter_off))
    start = losses(trained(off, tmp_path / "third"))[0]
    assert abs(start - math.log(2)) > 1e-3
    line = next(line for line in notices(tmp_path / "third") if "the reference is" in line)
    assert f"without the adapter {tuning.init_from}" in line


def test_a_reference_that_is_not_finite_is_refused_by_its_tensor(
    tmp_path: Path, tiny_llama: Path, rows: Path, builders
) -> None:
    other = builders.model(tmp_path / "other", seed=1)
    tensors = load_file(other / "model.safetensors")
    tensors["model.norm.weight"][3] = math.nan
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    config = lora_config(tiny_llama, rows, Reference.frozen, steps=1, reference_model=str(other))
    with pytest.raises(ModelError, match=r"NaN or infinity: model\.norm\.weight") as caught:
        trained(config, tmp_path / "run")
    assert caught.value.where == str(other / "model.safetensors")


@pytest.mark.slow
def test_a_named_model_is_the_reference(
    tmp_path: Path, tiny_llama: Path, rows: Path, builders
) -> None:
    other = builders.model(tmp_path / "other", seed=1)
    found = []
    for reference in (Reference.auto, Reference.frozen):
        config = lora_config(tiny_llama, rows, reference, steps=1, reference_model=str(other))
        found.append(losses(trained(config, tmp_path / reference.name)))
    assert found[0] == pytest.approx(found[1], abs=2e-5)
    assert abs(found[0][0] - math.log(2)) > 1e-2
    # As the policy the same model has the opposite margins.
    mirrored = pairs_config(
        other, rows, Dpo(reference_model=str(tiny_llama)), tuning=Full(), train={"steps": 1}
    )
    margins = [
        trained(each, tmp_path / name)[1]["dpo/margin"]
        for name, each in (("mirrored", mirrored), ("auto", config))
    ]
    assert margins[0] == pytest.approx(-margins[1], abs=1e-4)


def test_kto_measures_the_policy_before_each_update(
    tmp_path: Path, tiny_llama: Path, rows: Path
) -> None:
    config = pairs_config(
        tiny_llama,
        rows,
        Kto(),
        tuning=Lora(rank=4),
        train={"steps": 3, "micro_batch_size": 2, "rehearse": True},
    )
    metrics = [row for row in trained(config, tmp_path / "run") if row["step"]]
    # Before the first update policy and reference are one: no divergence, and sigmoid(0).
    assert metrics[0]["kto/kl"] == 0.0
    assert metrics[0]["train/loss"] == pytest.approx(0.5, abs=1e-7)
    assert abs(metrics[2]["kto/kl"]) > 1e-3


def test_a_wrong_reference_stops_the_run(tmp_path: Path, tiny_llama: Path, rows: Path) -> None:
    config = pairs_config(tiny_llama, rows, Dpo(), train={"steps": 2})
    folder = tmp_path / "run"
    trained(config, folder)
    array = folder / open_reference.FOLDER / "logprob.npy"
    np.save(array, np.load(array) + np.float32(1e-3))
    about = array.with_name("about.json")
    about.write_text(json.dumps({**json.loads(about.read_text()), "digests": None}))
    again = replace(config, train=replace(config.train, resume="never"))
    with pytest.raises(TrainingError, match="differ before the first update") as caught:
        train(again, folder)
    assert "1.0e-03" in str(caught.value).lower() or "1.00e-03" in str(caught.value)


def test_other_tokenizers_and_adapters_are_refused(
    tmp_path: Path, tiny_llama: Path, rows: Path, builders
) -> None:
    from posttrain_dist.preflight import input_problems

    other = builders.model(tmp_path / "other", seed=1)
    text = (other / "tokenizer.json").read_text(encoding="utf-8")
    tokenizer = json.loads(text)
    vocabulary = tokenizer["model"]["vocab"]
    first, second = sorted(vocabulary, key=vocabulary.get)[50:52]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    config = lora_config(tiny_llama, rows, Reference.auto, reference_model=str(other))
    (problem,) = input_problems(config)
    assert isinstance(problem, ConfigError) and problem.where == "objective.reference_model"
    assert "another tokenizer than the policy: 2 tokens differ" in problem.what
    assert repr(first) in problem.what
