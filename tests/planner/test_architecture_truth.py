"""Every architecture that is trained: its peak predicted beside measured, with its own defaults."""

import dataclasses
import json
import sys
from pathlib import Path

import pytest
import small_configs
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from posttrain_dist.models.architectures.known import TRAINED

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
# Wide and deep enough for activations to be most of the memory.
SIZES = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "word_embed_proj_dim"), 128),
    **dict.fromkeys(("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size"), 384),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers"), 4),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads"), 8),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "sliding_window"), 1024),
    "vocab_size": 512,
    "head_dim": 16,
    "rotary_dim": 8,
    "q_lora_rank": 48,
    "kv_lora_rank": 32,
    **dict.fromkeys(("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"), 16),
}
FOUR_LAYERS = [small_configs.SLIDING, small_configs.FULL] * 2


def config_values(kind):
    """config.json of an architecture, a hundred times the size of the other tests' one."""
    changes = dict(small_configs.CHANGES.get(kind, {}))
    wider = {"layer_types": FOUR_LAYERS, "vocab_size_per_layer_input": 512, "global_head_dim": 32}
    changes |= {key: value for key, value in wider.items() if key in changes}
    if "num_key_value_heads" in changes:
        changes["num_key_value_heads"] = 8
    values = json.loads(json.dumps(small_configs.small_config(kind, changes).to_dict()))
    return values | {"architectures": [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind]]}


@pytest.mark.slow
@pytest.mark.parametrize("kind", sorted(TRAINED))
def test_the_peak_of_every_architecture_is_predicted(monkeypatch, tmp_path, kind):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import plan_truth

    for name, value in SIZES.items():
        monkeypatch.setitem(small_configs.SIZE, name, value)
    arm = dataclasses.replace(plan_truth.arms.Arm(), model=config_values(kind))
    row = plan_truth.row_of(
        plan_truth.predict(arm, tmp_path), plan_truth.measure_here(arm, tmp_path)
    )
    for name in [path.stem for path in BENCHMARKS.glob("*.py")]:
        sys.modules.pop(name, None)
    assert -0.01 <= row["error"] <= 0.05, row["phases"]
