"""The size of a checkpoint of the single engine, as planned and on the disk."""

from __future__ import annotations

import pytest
from zero_plan import zero_config, zero_job

from posttrain_dist.build import build_policy, make_engine, pick_dtype
from posttrain_dist.checkpoint.trained_state import save_trained
from posttrain_dist.config import Single
from posttrain_dist.data.packs.collate import filler
from posttrain_dist.dist import Process
from posttrain_dist.planner.memory.disk import checkpoint_bytes, export_bytes


@pytest.mark.parametrize(
    "case",
    [
        {"dtype": "float32"},
        {"dtype": "bfloat16"},
        {"dtype": "bfloat16", "rank": 8},
        {"dtype": "bfloat16", "reward": True},
        {"dtype": "bfloat16", "rank": 8, "reward": True},
    ],
)
def test_a_checkpoint_of_one_process(case, tmp_path, builders):
    folder = builders.model(tmp_path / "model")
    config = zero_config(folder, {"stage": 0, **case}, 1)
    config.engine = Single()
    dtype = pick_dtype(config.train.dtype, config)
    engine = make_engine(config, Process(), dtype)
    build_policy(config, engine, dtype, ["all"])
    batch = filler(config.objective)
    count = config.objective.count(batch)
    loss = engine.forward(batch, config.objective, count._make([1.0] * len(count)))
    engine.backward(loss.total, last=True)
    engine.step(1e-4)
    state = tmp_path / "state"
    state.mkdir()
    if config.tuning.whole_model:
        engine.save_state(state)
    else:
        save_trained(engine, config.tuning.kept, 1, state)
    written = sum(path.stat().st_size for path in state.iterdir())
    foretold = checkpoint_bytes(zero_job(config))
    assert foretold <= written <= foretold + 60_000
    if not config.tuning.whole_model:
        return
    weights = sum(t.nbytes for _, t in engine.full_tensors())
    assert export_bytes(zero_job(config)) == weights
