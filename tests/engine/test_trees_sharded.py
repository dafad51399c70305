"""Trees of samples under ZeRO on two ranks: the steps of each path alone on one process."""

from __future__ import annotations

import json

import pytest

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("stage", "recompute", "lora"),
    [(2, "none", False), (3, "none", False), (3, "full", False), (3, "full", True)],
)
def test_two_ranks_train_on_trees_as_one_does_on_paths(
    run_workers, tiny_llama, stage, recompute, lora
):
    case = json.dumps({"stage": stage, "recompute": recompute, "lora": lora})
    output = run_workers("step_trees.py", 2, tiny_llama, case)[0]
    found = json.loads(next(x for x in output.splitlines() if x.startswith("FOUND "))[6:])
    single, sharded = found["losses"]
    assert sharded == pytest.approx(single, rel=1e-6)
    assert single[2] != single[0]
    assert found["norms"][1] == pytest.approx(found["norms"][0], rel=1e-5)
    assert found["apart"] < 1e-6
