"""Only supervised rows leave the last layer, and nothing else changes."""

from __future__ import annotations

from contextlib import nullcontext

import numpy as np
import pytest
import torch
from posttrain_kernels import linear_cross_entropy

from posttrain_dist.data.collate import collate
from posttrain_dist.flow import Example
from posttrain_dist.models import ModelConfig
from posttrain_dist.models.load import load_model
from posttrain_dist.models.policy import Policy

CAPS = {"final_logit_softcapping": 3.0, "attn_logit_softcapping": 2.0}
ARCHITECTURES = {
    "Llama": {},
    "Qwen2": {},
    "Qwen3": {},
    "Mistral": {"sliding_window": 6},
    "Gemma2": {"sliding_window": 6, "query_pre_attn_scalar": 8, **CAPS},
    "Phi": {},  # no layer of its kind is known here: attention and MLP side by side
}


@pytest.fixture(scope="module", params=ARCHITECTURES)
def policy(request, tmp_path_factory, builders):
    target = tmp_path_factory.mktemp(request.param)
    folder = builders.model(target, request.param, **ARCHITECTURES[request.param])
    config = ModelConfig(path=str(folder))
    model = load_model(config, folder, dtype=torch.float64, seed=0, materialise=nullcontext())
    return Policy(model, linear_cross_entropy, num_channels=2)


def batch_of(masked: float, vocabulary: int = 200):
    """Four samples of which a share of the tokens is no target; 1.0 leaves one target."""
    draw = np.random.default_rng(1)
    rows = []
    for i, length in enumerate([5, 17, 2, 11]):
        weight_L = (draw.random(length) >= masked) * draw.uniform(0.5, 2.0, length)
        if masked == 1.0 and i == 1:
            weight_L[7] = 1.0
        ids_L = draw.integers(5, vocabulary, length).astype(np.int32)
        rows.append(Example(ids_L, weight_L.astype(np.float32), channel=i % 2, sample_id=i))
    return collate(rows)


@pytest.mark.parametrize("masked", [0.0, 0.7, 1.0])
def test_hidden_states_are_those_of_the_whole_row(policy, masked):
    batch = batch_of(masked)
    backbone = policy.causal_lm.base_model
    whole = backbone(
        input_ids=batch.input_ids_T[None],
        position_ids=batch.position_ids_T[None],
        cu_seqlens=batch.cu_seqlens_S,
        use_cache=False,
    ).last_hidden_state[0]
    assert len(whole) == 35
    rows = policy.hidden(batch)
    assert rows.shape == (128, whole.shape[1])
    torch.testing.assert_close(rows, whole[batch.supervised_N], rtol=1e-12, atol=1e-12)
