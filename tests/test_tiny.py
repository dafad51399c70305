"""The whole story on one page: a line of a file becomes an update of a model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from posttrain_dist.build import build_policy, make_engine, make_source
from posttrain_dist.config import DataConfig, Dtype, ModelConfig, RunConfig, TrainConfig, complete
from posttrain_dist.data.prepared.arrays import Examples
from posttrain_dist.dist import Process
from posttrain_dist.engine import AdamW
from posttrain_dist.loop import fit
from posttrain_dist.metrics.channels import ChannelMeter
from posttrain_dist.prepare import prepare

# The losses of this very run, to the last bit, by CPU, its capability and torch. A refactor leaves
# them as they are; on a machine that is not in the list the run is only made twice and compared.
KNOWN: dict[str, list[str]] = {
    "AMD EPYC, AVX2, torch 2.13.0+cpu": [
        "0x1.7c011e0000000p+2",
        "0x1.3b93ee0000000p+2",
        "0x1.0ef7a08000000p+2",
    ],
}


def machine() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "?")
    return f"{cpu}, {torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}"


@pytest.fixture
def config(tmp_path, builders):
    rows = [
        builders.chat("copy ab", "ab", "copy"),
        builders.chat("copy c", "c", "copy"),
        builders.chat("reverse ab", "ba", "reverse"),
    ]
    return complete(
        RunConfig(
            model=ModelConfig(path=str(builders.model(tmp_path / "model"))),
            data=DataConfig(
                train=str(builders.write(tmp_path / "rows.jsonl", rows)),
                eval_fraction=0.0,
                max_length=64,
            ),
            optimizer=AdamW(lr=1e-2, warmup_ratio=0.0),
            train=TrainConfig(steps=3, batch_size=1, dtype=Dtype.float32),
        )
    )


def steps(config, examples):
    """(steps, policy): the loop over one process."""
    engine = make_engine(config, Process(), torch.float32)
    policy = build_policy(config, engine, torch.float32, examples.channels)
    meter = ChannelMeter(examples.channels, config.objective, engine.device)
    infos = fit(
        engine=engine,
        source=make_source(config, examples, Process()),
        objective=config.objective,
        meter=meter,
        describe=meter.train_metrics,
        learning_rate=lambda step: config.optimizer.lr,
        steps=3,
    )
    return infos, policy


def test_from_a_line_of_a_file_to_an_update(config, tmp_path):
    import transformers

    # A file line becomes a Record, a Record becomes tokens; the assistant's are supervised.
    prepare(config, tmp_path / "prepared")
    examples = Examples.open(tmp_path / "prepared", "train")
    assert examples.channels == ["copy", "reverse"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(config.model.path)
    first = examples[0]
    assert tokenizer.decode(first.input_ids_L) == "<|user|>copy ab<|end|><|assistant|>ab<|end|>"
    assert tokenizer.decode(first.input_ids_L[first.weight_L > 0]) == "ab<|end|>"

    # The three Examples fit into one pack: ONE row, nothing between them, labels shifted.
    source = make_source(config, examples, Process())
    (batch,) = source.step(1)
    assert sorted(batch.sample_id_S) == [0, 1, 2]
    assert batch.cu_seqlens_S[-1] == len(batch.input_ids_T) == examples.lengths.sum()
    starts = batch.cu_seqlens_S[:-1]
    assert batch.position_ids_T[starts].tolist() == [0, 0, 0]
    assert torch.equal(batch.input_ids_T[batch.supervised_N + 1], batch.labels_N)
    assert batch.num_targets == sum(int((examples[i].weight_L > 0).sum()) for i in range(3))

    # The loss is the mean over supervised tokens, by hand with plain transformers.
    model = transformers.AutoModelForCausalLM.from_pretrained(config.model.path)
    sums = {name: [0.0, 0] for name in examples.channels}
    for i in range(3):
        ids = torch.from_numpy(examples[i].input_ids_L.astype(np.int64))
        logits = model(input_ids=ids[None]).logits[0, :-1]
        nll = torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none")
        mask = torch.from_numpy(examples[i].weight_L[1:] > 0)
        entry = sums[examples.channels[examples[i].channel]]
        entry[0] += float(nll[mask].detach().double().sum())
        entry[1] += int(mask.sum())
    total = sum(entry[0] for entry in sums.values()) / sum(entry[1] for entry in sums.values())

    # The loop yields step 0 (before training), then one StepInfo an update.
    infos, _ = steps(config, examples)
    seen = list(infos)
    assert [info.step for info in seen] == [0, 1, 2, 3]
    metrics = seen[1].metrics
    assert metrics["train/loss"] == pytest.approx(total, rel=1e-6)
    for name, (loss, weight) in sums.items():
        assert metrics[f"channel_loss/{name}"] == pytest.approx(loss / weight, rel=1e-6)

    # Every update is taken: the loss of the same pack falls.
    losses = [info.metrics["train/loss"] for info in seen[1:]]
    assert losses[0] > losses[1] > losses[2]


def test_the_run_is_the_same_to_the_last_bit(config, tmp_path):
    prepare(config, tmp_path / "prepared")
    examples = Examples.open(tmp_path / "prepared", "train")
    runs = []
    for _ in range(2):
        infos, policy = steps(config, examples)
        losses = [info.metrics["train/loss"].hex() for info in infos if info.step]
        weights = {name: p.detach().clone() for name, p in policy.named_parameters()}
        runs.append((losses, weights))
    assert runs[0][0] == runs[1][0]
    assert all(torch.equal(runs[0][1][name], w) for name, w in runs[1][1].items())
    if machine() in KNOWN:
        assert runs[0][0] == KNOWN[machine()]
