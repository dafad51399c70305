"""Between log steps the host reads nothing back: on a GPU every such read waits for the device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from posttrain_dist.build import build_policy, make_engine, make_source
from posttrain_dist.config import DataConfig, Dtype, ModelConfig, RunConfig, TrainConfig, complete
from posttrain_dist.data.prepared.arrays import Examples
from posttrain_dist.dist import Process
from posttrain_dist.loop import fit
from posttrain_dist.metrics.special_tokens import TokenMeter
from posttrain_dist.objectives.base import Objective
from posttrain_dist.objectives.preference.simpo import Simpo
from posttrain_dist.objectives.sft import Sft
from posttrain_dist.prepare import prepare

READS = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default}


class Reads(TorchDispatchMode):
    """Counts what makes the host wait: item(), float(), bool() of a tensor, and nonzero()."""

    count = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.count += function in READS
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("objective", [Sft(), Simpo(sft_weight=1.0)], ids=lambda each: each.name)
def test_steps_that_are_not_logged_read_nothing_back(
    objective: Objective,
    tmp_path: Path,
    tiny_llama: Path,
    rows_file: Path,
    builders: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if objective.rows == "pairs":
        pairs = [{"prompt": f"is it {i}?", "chosen": "yes", "rejected": "no"} for i in range(60)]
        rows_file = builders.write(tmp_path / "pairs.jsonl", pairs)
    # What the kernels look at on a CPU alone, as if this were a GPU.
    for name in (
        "linear_cross_entropy.check_rows",
        "linear_logprob.check_rows",
        "linear_cross_entropy.check_channel",
        "arguments.check_denominator",
    ):
        monkeypatch.setattr(f"posttrain_kernels.losses.{name}", lambda *_: None)
    for place in ("arguments", "linear_logprob"):
        monkeypatch.setattr(
            f"posttrain_kernels.losses.{place}.select_labelled_rows",
            lambda _, supervised: (None, supervised),
        )
    config = complete(
        RunConfig(
            model=ModelConfig(path=str(tiny_llama)),
            objective=objective,
            data=DataConfig(train=str(rows_file), max_length=64),
            train=TrainConfig(steps=4, batch_size=4, micro_batch_size=2, dtype=Dtype.float32),
        )
    )
    prepare(config, tmp_path / "prepared")
    examples, process = Examples.open(tmp_path / "prepared", "train"), Process()
    engine = make_engine(config, process, torch.float32)
    build_policy(config, engine, torch.float32, list(examples.channels))
    meter = TokenMeter(list(examples.channels), {0: "end"}, config.objective, engine.device)
    steps = fit(
        engine=engine,
        source=make_source(config, examples, process),
        objective=config.objective,
        meter=meter,
        describe=meter.train_metrics,
        learning_rate=lambda step: 1e-3 / step,
        steps=4,
        log_every=(4,),
    )
    reads = []
    next(steps)  # step 0
    for _ in range(4):
        with Reads() as mode:
            info = next(steps)
        reads.append(mode.count)
    assert reads[:3] == [0, 0, 0], reads
    assert reads[3] > 0 and info.metrics["train/grad_norm"] > 0
