"""The model card names who can load an adapter, and the command where one cannot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from posttrain_dist.tuning.adapters.model_card import adapter_card, effective_scale, merged_card
from posttrain_dist.tuning.saved_adapter import SavedAdapter

LORA = {"peft_type": "LORA", "r": 12, "lora_alpha": 24}


def card(config: dict[str, Any], name: str = "q_proj.lora_A.weight", **tuning: Any) -> str:
    saved = SavedAdapter(config, {name: torch.ones(3, 5)})
    return adapter_card(saved, Path("/models/M"), method="x", tuning=tuning)


@pytest.mark.parametrize(
    ("config", "tuning", "said", "not_said"),
    [
        (LORA, {}, "vLLM, with `--enable-lora --max-lora-rank 16`", "--merge"),
        ({**LORA, "r": 600}, {}, "ranks up to 512, and this is 600", "--enable-lora"),
        ({**LORA, "use_dora": True}, {}, "not vLLM: it refuses DoRA", "--enable-lora"),
        ({**LORA, "use_dora": True}, {}, "wrongly on a base in NF4 on some CPUs", "--enable-lora"),
        ({**LORA, "modules_to_save": ["norm"]}, {}, "refuses `modules_to_save`", "--enable-lora"),
        ({**LORA, "trainable_token_indices": [9]}, {}, "needs the merged model", "--enable-lora"),
        ({**LORA, "use_rslora": True}, {}, "--plain` folds the scale into alpha", "PiSSA"),
        (LORA, {"init": "pissa"}, "plain LoRA of twice the trained rank (12)", "--plain"),
        (LORA, {"quantize": "nf4"}, "beside the base in NF4", "--plain"),
        ({"peft_type": "IA3"}, {}, "no server of LoRA adapters", "vLLM"),
        ({"peft_type": "PREFIX_TUNING"}, {}, "have no prefix tuning", "--merge"),
        ({"config": {}}, {}, "`adapters` library", "peft import"),
        ({"config": {"architecture": "own"}}, {}, "- this project\n", "`adapters` library"),
    ],
)
def test_who_can_load_it(
    config: dict[str, Any], tuning: dict[str, Any], said: str, not_said: str
) -> None:
    text = card(config, **tuning)
    assert said in text and not_said not in text


def test_the_table_and_the_lines_that_load_it(tmp_path: Path) -> None:
    text = card(LORA, "lm_head.lora_A.weight", init="pissa")
    assert "| method | x (PiSSA) |" in text and "| parameters | 15 |" in text
    assert "| base model | `/models/M` |" in text and "adapts the head" in text
    code = text.partition("```python\n")[2].partition("```")[0]
    compile(code, "card", "exec")
    assert "from_pretrained('/models/M', dtype=\"auto\")" in code and code.count("\n") == 3


def test_the_effective_scale() -> None:
    assert effective_scale(LORA) == "2 (alpha 24 / rank 12)"
    assert effective_scale({**LORA, "r": 16, "use_rslora": True}) == "6 (alpha 24 / sqrt(rank 16))"
    assert effective_scale({"peft_type": "IA3"}) == ""


def test_a_merged_model_tells_what_was_measured() -> None:
    text = merged_card(
        Path("/models/M"), method="qlora", facts={"loss": "1.2"}, notes=["The closer one."]
    )
    assert "| loss | 1.2 |" in text and text.rstrip().endswith("The closer one.")
    assert 'library_name: "transformers"' in text
