"""The same training with a reference in one process and sharded over two, and its resume."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
from preference_runs import losses, notices, pairs_config, trained, write_pairs

from posttrain_dist.config import Bottleneck, DeepSpeed, Ia3, Lora, ModelConfig, Prompt
from posttrain_dist.files import read_rows
from posttrain_dist.models import Checkpointing
from posttrain_dist.objectives.preference.dpo import Dpo
from posttrain_dist.objectives.preference.kto import Kto
from posttrain_dist.objectives.reference_choice import Reference
from posttrain_dist.prepare import prepare

LORA = Lora(rank=4)
CASES = {
    "off": (Dpo(), LORA),
    "precomputed": (Dpo(reference=Reference.precomputed), LORA),
    "frozen": (Dpo(reference=Reference.frozen), LORA),
    "bottleneck": (Dpo(), Bottleneck(reduction=4)),
    "dora": (Dpo(), Lora(rank=4, dora=True)),
    "head": (Dpo(), Lora(rank=4, targets=["q_proj", "lm_head"])),
    "ia3": (Dpo(), Ia3()),
    "prompt": (Dpo(), Prompt(tokens=3)),
    "kto": (Kto(), LORA),
    "named": (Dpo(reference_model="another"), LORA),
}


def runs_of(
    names: list[str], stage: int, tiny_llama: Path, other: Path, root: Path
) -> tuple[dict[str, list[float]], dict[str, Path]]:
    """Losses of one process, and the folders of the same runs for two ranks."""
    rows = write_pairs(root / "pairs.jsonl")
    # Recomputed layers: their second forward must be with the adapter, as their first.
    model = ModelConfig(path=str(tiny_llama), activation_checkpointing=Checkpointing.full)
    alone, folders = {}, {}
    for name in names:
        objective, tuning = CASES[name]
        if name == "named":
            objective = replace(objective, reference_model=str(other))
        train = {"steps": 3, "batch_size": 4, "save_every": 2}
        config = pairs_config(tiny_llama, rows, objective, tuning=tuning, model=model, train=train)
        alone[name] = losses(trained(config, root / f"{name}-alone"))
        folder = folders[name] = root / name
        engine = DeepSpeed(stage=stage, persistence_threshold=0)
        cache = replace(config.data, cache=str(root / f"cache-{name}"))  # its own pass
        sharded = replace(config, engine=engine, data=cache)
        prepare(sharded, folder / "prepared")
        (folder / "config.yaml").write_text(sharded.to_yaml(), encoding="utf-8")
    return alone, folders


@pytest.mark.parametrize(
    ("stage", "names"),
    [
        (0, ["off", "precomputed", "frozen", "kto"]),
        (1, ["off", "frozen", "prompt"]),
        (2, ["precomputed", "bottleneck", "kto"]),
        (3, ["off", "precomputed", "frozen", "named"]),
        (3, ["bottleneck", "dora", "head", "ia3", "prompt", "kto"]),
    ],
)
@pytest.mark.slow
def test_two_ranks_train_as_one(stage, names, tiny_llama, tmp_path, run_workers, builders):
    other = builders.model(tmp_path / "other", seed=1)
    alone, folders = runs_of(names, stage, tiny_llama, other, tmp_path)
    run_workers("train_runs.py", 2, *folders.values())
    for name, folder in folders.items():
        found = losses(read_rows(folder / "metrics.jsonl"))
        assert found == pytest.approx(alone[name], rel=2e-4), name
        if name not in ("kto", "named"):
            assert found[0] == pytest.approx(math.log(2), abs=2e-5), name
        if name == "precomputed":
            assert any("the reference: done" in line for line in notices(folder))
