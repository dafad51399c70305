"""The rehearsal of runs whose batches models fill: it leaves nothing of itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from preference_runs import pairs_config, trained, write_pairs

from posttrain_dist.checkpoint import store
from posttrain_dist.config import Full, Lora
from posttrain_dist.objectives.base import Objective
from posttrain_dist.objectives.preference.dpo import Dpo
from posttrain_dist.objectives.preference.kto import Kto
from posttrain_dist.objectives.preference.reward import Reward
from posttrain_dist.objectives.reference_choice import Reference
from posttrain_dist.tuning.base import Tuning

CASES: dict[str, tuple[Callable[[], Objective], Callable[[], Tuning]]] = {
    "dpo adapter_off": (lambda: Dpo(sft_weight=0.5), lambda: Lora(rank=4)),
    "dpo precomputed": (Dpo, Full),
    "dpo frozen": (lambda: Dpo(reference=Reference.frozen), Full),
    "reward": (Reward, lambda: Lora(rank=4)),
    "kto": (Kto, lambda: Lora(rank=4)),
}
MEASURED = ("time_s", "train/tokens_per_s", "system/memory_bytes")


@pytest.mark.parametrize(
    "name",
    [n if n == "dpo adapter_off" else pytest.param(n, marks=pytest.mark.slow) for n in CASES],
)
def test_a_rehearsed_run_is_the_same(name: str, tiny_llama: Path, tmp_path: Path):
    objective, tuning = CASES[name]
    rows = write_pairs(tmp_path / "pairs.jsonl")
    found = []
    for rehearse in (False, True):
        steps = {"steps": 2, "batch_size": 4, "micro_batch_size": 2, "rehearse": rehearse}
        config = pairs_config(tiny_llama, rows, objective(), tuning=tuning(), train=steps)
        config.data.convert_pairs = name == "kto"
        folder = tmp_path / f"rehearsed-{rehearse}"
        metrics = trained(config, folder)
        log = (folder / "logs" / "rank-0.log").read_text(encoding="utf-8")
        assert ("rehearsed the heaviest batch" in log) is rehearse
        numbers = [{k: v for k, v in row.items() if k not in MEASURED} for row in metrics]
        state = store.whole_checkpoints(folder)[-1] / store.STATE
        found.append((numbers, {file.name: file.read_bytes() for file in state.iterdir()}))
    assert len(found[0][0]) == 3  # steps 0 to 2
    assert found[0] == found[1]
