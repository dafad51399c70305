"""Optimizer state by parameter name: every stage of ZeRO against the single engine."""

from __future__ import annotations

import json

import pytest


@pytest.mark.parametrize(
    ("dtype", "world", "stages"),
    [
        ("float32", 2, "2"),
        pytest.param("bfloat16", 2, "0123", marks=pytest.mark.slow),
        pytest.param("float32", 1, "0123", marks=pytest.mark.slow),
        pytest.param("float32", 3, "0123", marks=pytest.mark.slow),
    ],
)
def test_state_is_exact_in_every_layout(dtype, world, stages, tiny_llama, run_workers, tmp_path):
    out = run_workers("named_state.py", world, tiny_llama, tmp_path, dtype, stages)
    told = [json.loads(text.split("TOLD ")[1].splitlines()[0]) for text in out]
    for each in told:
        assert "".join(each) == stages
        for stage, found in each.items():
            assert found["keys"] and found["back"] and found["goes on"], (stage, found)
            assert found["from single"] and found["kept"], (stage, found)
            assert found["steps"] == [3.0]
            # Gradients in bfloat16 are added up in other orders.
            assert found["far"] < (1e-4 if dtype == "float32" else 0.3), (stage, found["far"])
            assert found["freed"].endswith(
                "frozen parameters changed: model.layers.1.mlp.down_proj.weight"
            )
            assert found["unconnected"] == (
                "1 of 8 trained parameters had no gradient in 2 updates: "
                "model.layers.1.mlp.extra.weight"
            )
