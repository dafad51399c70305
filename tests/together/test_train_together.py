"""Runs that train together over one base, beside each of them alone."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from posttrain_dist.config import (
    AdamW,
    DataConfig,
    Dtype,
    Lora,
    ModelConfig,
    Quantize,
    RunConfig,
    TrainConfig,
    complete,
)
from posttrain_dist.engine.single import SingleEngine
from posttrain_dist.errors import ConfigError, TrainingError
from posttrain_dist.files import read_rows
from posttrain_dist.models import Checkpointing
from posttrain_dist.models.policy import Policy
from posttrain_dist.prepare import prepare
from posttrain_dist.together.train_together import train_together
from posttrain_dist.train import train
from posttrain_dist.tuning.lora import LoraInit

TRIALS = [
    (Lora(rank=2, alpha=4.0), AdamW(lr=3e-3, clip=0.5)),
    (Lora(rank=8, alpha=32.0), AdamW(lr=1e-2, clip=0.05)),
    (Lora(rank=4, alpha=4.0, rslora=True), AdamW(lr=1e-3, weight_decay=0.1)),
]


@pytest.fixture
def base(tiny_llama: Path, rows_file: Path) -> RunConfig:
    return RunConfig(
        model=ModelConfig(path=str(tiny_llama)),
        data=DataConfig(train=str(rows_file), eval_fraction=0.3, max_length=64),
        train=TrainConfig(
            steps=4, batch_size=4, micro_batch_size=2, eval_every=2, dtype=Dtype.float32
        ),
    )


def prepared(config: RunConfig, folder: Path) -> tuple[RunConfig, Path]:
    config = complete(config)
    prepare(config, folder / "prepared")
    return config, folder


def runs_of(
    base: RunConfig, folder: Path, trials=TRIALS, **changes
) -> list[tuple[RunConfig, Path]]:
    return [
        prepared(replace(base, tuning=tuning, optimizer=optimizer, **changes), folder / str(i))
        for i, (tuning, optimizer) in enumerate(trials)
    ]


def metrics(folder: Path) -> dict[str, dict[int, float]]:
    """Every number that the training itself decides, by name and step."""
    found: dict[str, dict[int, float]] = {}
    for row in read_rows(folder / "metrics.jsonl"):
        for name, value in row.items():
            if name.partition("/")[0] not in ("step", "time_s", "system", "train"):
                found.setdefault(name, {})[row["step"]] = value
            if name in ("train/loss", "train/grad_norm", "train/lr"):
                found.setdefault(name, {})[row["step"]] = value
    return found


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def assert_equal_runs(alone: Path, together: Path) -> None:
    expected, found = metrics(alone), metrics(together)
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert found[name] == pytest.approx(values, rel=1e-6, abs=1e-7), name
    weights = adapter(alone)
    assert adapter(together).keys() == weights.keys()
    for name, tensor in adapter(together).items():
        torch.testing.assert_close(tensor, weights[name], rtol=0, atol=1e-5)


def test_each_has_the_losses_and_weights_of_its_run_alone(base, tmp_path, monkeypatch):
    for config, folder in runs_of(base, tmp_path / "alone"):
        train(config, folder)

    rows: list[int] = []
    hidden = Policy.hidden

    def recording(self, batch):
        if torch.is_grad_enabled():
            rows.append(batch.sample_id_S.count(batch.sample_id_S[0]))
        return hidden(self, batch)

    monkeypatch.setattr(Policy, "hidden", recording)
    together = runs_of(base, tmp_path / "together")
    assert train_together(together) == [None, None, None]
    for i, (_, folder) in enumerate(together):
        assert_equal_runs(tmp_path / "alone" / str(i), folder)
    # One pass of the backbone for all three: two micro-batches of each of four steps.
    assert [count for count in rows if count == 3] == [3] * 8
    ranks = [adapter(f)[next(n for n in adapter(f) if "lora_A" in n)].shape[0] for _, f in together]
    assert ranks == [2, 8, 4]


def compare(base: RunConfig, folder: Path, trials: list[tuple[Lora, AdamW]]) -> None:
    for config, own in runs_of(base, folder / "alone", trials):
        train(config, own)
    together = runs_of(base, folder / "together", trials)
    assert train_together(together) == [None] * len(trials)
    for i, (_, own) in enumerate(together):
        assert_equal_runs(folder / "alone" / str(i), own)


def test_dora_and_an_adapted_head_beside_plain_lora(base, tmp_path):
    targets = ["q_proj", "down_proj", "lm_head"]
    dora, plain = Lora(rank=2, dora=True, targets=targets), Lora(rank=3, targets=targets)
    compare(base, tmp_path, [(dora, AdamW(lr=3e-3)), (plain, AdamW(lr=1e-2))])


def test_recomputed_activations_see_their_segments_too(base, tmp_path):
    model = replace(base.model, activation_checkpointing=Checkpointing.full)
    compare(replace(base, model=model), tmp_path, TRIALS[:2])


def test_a_base_in_nf4_is_shared_too(base, tmp_path, nf4_llama):
    model = replace(base.model, path=str(nf4_llama))
    trials = [(replace(tuning, quantize=Quantize.nf4), optimizer) for tuning, optimizer in TRIALS]
    compare(replace(base, model=model), tmp_path, trials[:2])


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["Qwen3", "Gemma2", "Mistral"])
def test_other_architectures(base, tmp_path, architecture, builders):
    path = builders.model(tmp_path / "model", architecture)
    trials = [(replace(TRIALS[0][0], freeze_a=True), TRIALS[0][1]), TRIALS[1]]
    compare(replace(base, model=replace(base.model, path=str(path))), tmp_path, trials)


def test_the_base_is_there_once(base, tmp_path, monkeypatch):
    engines: list[SingleEngine] = []
    attach = SingleEngine.attach
    monkeypatch.setattr(
        SingleEngine, "attach", lambda self, policy: (engines.append(self), attach(self, policy))[1]
    )
    assert train_together(runs_of(base, tmp_path)) == [None, None, None]
    frozen = [
        {p.data_ptr() for p in engine.policy.parameters() if not p.requires_grad}
        for engine in engines
    ]
    assert len(frozen[0]) > 10 and frozen[0] == frozen[1] == frozen[2]
    trained = [
        {p.data_ptr() for p in engine.policy.parameters() if p.requires_grad} for engine in engines
    ]
    assert not trained[0] & trained[1] and not trained[1] & trained[2]


def test_one_that_is_stopped_or_fails_leaves_the_others_alone(base, tmp_path, monkeypatch):
    alone = runs_of(base, tmp_path / "alone")
    train(*alone[2])
    together = runs_of(base, tmp_path / "together")
    step, updates = SingleEngine.step, []

    def failing(self, lr):
        updates.append(self)
        if len(updates) == 4:  # the first run's second
            raise TrainingError("fails", where="here", fix="none")
        if len(updates) == 5:  # the second run goes on by one step, and leaves
            (together[1][1] / "STOP").touch()
        return step(self, lr)

    monkeypatch.setattr(SingleEngine, "step", failing)
    failed, stopped, finished = train_together(together)
    assert isinstance(failed, TrainingError) and stopped is None and finished is None
    outcome = json.loads((together[1][1] / "logs" / "outcome.json").read_text())
    assert (outcome["outcome"], outcome["step"]) == ("stopped", 3)
    assert (together[1][1] / "checkpoints" / "step-000003" / "MANIFEST.json").is_file()
    monkeypatch.undo()
    assert_equal_runs(alone[2][1], together[2][1])

    # The one that left goes on, alone or with others, and ends as if nothing had been.
    (together[1][1] / "STOP").unlink()
    train(*alone[1])
    assert train_together([together[0], together[1]]) == [None, None]
    assert_equal_runs(alone[1][1], together[1][1])


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"seed": 1}, "seed"),
        ({"tuning": Lora(rank=2, dropout=0.1)}, "tuning.dropout"),
        ({"tuning": Lora(rank=2, init=LoraInit.pissa)}, "tuning.init"),
        ({"tuning": Lora(rank=2, targets=["q_proj"])}, "tuning.targets"),
        ({"train": TrainConfig(steps=5, dtype=Dtype.float32)}, "train.batch_size"),
    ],
)
def test_what_cannot_share_is_refused_by_its_key(base, tmp_path, change, key):
    (first, folder), other = runs_of(base, tmp_path, TRIALS[:2])
    changed = replace(other[0], **change)
    with pytest.raises(ConfigError) as error:
        train_together([(first, folder), (changed, other[1])])
    assert error.value.where == key
    assert not (folder / "metrics.jsonl").exists()
