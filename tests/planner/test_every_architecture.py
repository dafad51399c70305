"""Every trained architecture is planned, with the state of all its parameters."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
from small_configs import VARIANTS, small_config
from zero_plan import zero_config, zero_job

from posttrain_dist.config import Single
from posttrain_dist.models.architectures.known import TRAINED
from posttrain_dist.models.folder import read_network
from posttrain_dist.planner.memory.parameters import stored_parameters
from posttrain_dist.planner.memory.phases import device_phases
from posttrain_dist.planner.plan import Item, PhaseName

# By default: what has no norm, no norm at the end, layers that differ, latent attention, fused
# projections, learned positions.
SAMPLE = {"olmo", "gemma4_text", "minicpm3", "phi3", "gpt2", "llama"}


def cases():
    every = [(model_type, None) for model_type in sorted(TRAINED)] + VARIANTS
    return [
        pytest.param(t, c, marks=() if t in SAMPLE or (t == "opt" and c) else [pytest.mark.slow])
        for t, c in every
    ]


@pytest.mark.parametrize(("model_type", "changes"), cases())
def test_full_tuning_holds_weights_gradients_and_moments_of_all_parameters(
    model_type, changes, tmp_path
):
    config = small_config(model_type, changes).to_dict()
    (tmp_path / "config.json").write_text(json.dumps(config, default=str))
    run = replace(zero_config(tmp_path, {"stage": 3, "length": 64}, 1), engine=Single())
    job = zero_job(run)
    network = read_network(str(tmp_path))
    size, buffers = network.num_parameters, network.buffer_bytes
    stored = stored_parameters(job)
    assert sum(math.prod(each.shape) for each in stored) == size
    assert all(each.trained for each in stored)
    # In float32, alone on a CPU: no master weights, and two moments of a float32 each.
    phases = {phase.name: phase for phase in device_phases(job)}
    update = phases[PhaseName.update].items
    assert update[Item.weights] == 4 * size + buffers
    # That of the head's weight is an item of its own; a vector of single architectures may lack.
    gradients = update[Item.gradients] + update[Item.head]
    # Where the embedding is narrower than the layers (OPT 350M), it is taken for as wide.
    width = network.before[0].shape[1]
    more = 4 * (network.shape.hidden_size - width) * network.shape.vocab_size
    assert 4 * size - 1024 < gradients <= 4 * size + more
    assert update[Item.moments] == pytest.approx(8 * size, abs=16 * len(stored))
    forward = phases[PhaseName.forward].items
    assert forward[Item.activations] > 0 and forward[Item.weights] == 4 * size + buffers
    # Two ranks shard what one has whole.
    zero = device_phases(zero_job(zero_config(tmp_path, {"stage": 3, "length": 64}, 2)))
    sharded = next(phase for phase in zero if phase.name is PhaseName.save).items
    assert 4 * size <= sharded[Item.moments] < 5 * size
