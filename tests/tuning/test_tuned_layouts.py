"""LoRA's family and IA3 under every ZeRO stage: two ranks train as one process does."""

from __future__ import annotations

import json

import pytest

pytestmark = pytest.mark.slow

SMALL = {"rank": 4, "alpha": 6.0}
TUNINGS = {
    "lora": ["Lora", SMALL],
    "dora": ["Lora", {**SMALL, "dora": True, "dropout": 0.0}],
    "pissa": ["Lora", {**SMALL, "init": "pissa"}],
    "lora_fa": ["Lora", {**SMALL, "freeze_a": True, "targets": "attention"}],
    "head": ["Lora", {**SMALL, "targets": ["q_proj", "lm_head"]}],
    "head_alone": ["Lora", {**SMALL, "targets": ["lm_head"]}],
    "dora_head": ["Lora", {**SMALL, "targets": ["q_proj", "lm_head"], "dora": True}],
    "in_full": ["Lora", {**SMALL, "modules_to_save": ["model.norm", "lm_head", "embed_tokens"]}],
    "ia3": ["Ia3", {}],
}


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_two_ranks_train_as_one_process(run_workers, tiny_llama, stage):
    tunings = {name: [*each, "none"] for name, each in TUNINGS.items()}
    if stage == 3:
        tunings |= {f"{n} recomputed": [*TUNINGS[n], "full"] for n in ("dora_head", "ia3")}
    asked = json.dumps({"stage": stage, "tunings": tunings})
    output = run_workers("step_tuned.py", 2, tiny_llama, asked)[0]
    told = json.loads(next(x for x in output.splitlines() if x.startswith("TOLD "))[5:])
    assert told.keys() == tunings.keys()
    for name, found in told.items():
        single, sharded = found["losses"]
        assert sharded == pytest.approx(single, rel=1e-6), name
        assert single[2] < single[0], name
        assert found["norms"][1] == pytest.approx(found["norms"][0], rel=1e-5), name
        assert found["continued"] == 0.0 and found["base"] < 1e-6, name
        assert found["moved"] == found["trained"] != [], name
        assert found["start"] < 1e-6 and found["end"] < 2e-5, (name, found["start"], found["end"])
