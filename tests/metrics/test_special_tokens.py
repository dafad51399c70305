"""Which tokens are watched, and their sums against plain Python."""

from __future__ import annotations

import json
import random
from types import SimpleNamespace

import pytest
import torch

from posttrain_dist.flow import Loss
from posttrain_dist.metrics.special_tokens import SpecialTokenMeter, special_token_metrics
from posttrain_dist.metrics.watched_tokens import MAX_TOKENS, metric_name, special_tokens


def tokenizer(added: list[str], template: str = "", **named: str):
    """A fast tokenizer with these added tokens, ids from 3 on; `a b c` are its words."""
    from tokenizers import AddedToken, Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    plain = Tokenizer(models.WordLevel({"a": 0, "b": 1, "c": 2}, unk_token="a"))
    plain.add_special_tokens([AddedToken(t, special=True) for t in added if "tool" not in t])
    plain.add_tokens([AddedToken(t, special=False) for t in added if "tool" in t])
    fast = PreTrainedTokenizerFast(tokenizer_object=plain, **named)
    fast.chat_template = template
    return fast


# ------------------------------------------------------------------------------ the choice


def names_of(added: list[str], template: str = "", **named: str) -> dict[str, str]:
    """Token -> name."""
    made = tokenizer(added, template, **named)
    return {
        made.convert_ids_to_tokens(token_id): name
        for token_id, name in special_tokens(made).items()
    }


def test_qwen_like() -> None:
    added = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]
    added += ["<tool_call>", "</tool_call>", "<|vision_start|>", "<|fim_prefix|>", "<|image_pad|>"]
    assert names_of(added, eos_token="<|im_end|>", pad_token="<|endoftext|>") == {
        "<|im_start|>": "im_start",
        "<|im_end|>": "im_end",
        "<think>": "think",
        "</think>": "end_think",
        "<tool_call>": "tool_call",
        "</tool_call>": "end_tool_call",
    }


def test_llama_like() -> None:
    added = ["<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>", "<|eot_id|>"]
    added += ["<|start_header_id|>", "<|end_header_id|>", "<|python_tag|>", "<|eom_id|>"]
    found = names_of(added, eos_token="<|eot_id|>", bos_token="<|begin_of_text|>")
    assert set(found.values()) == {
        "end_of_text",
        "eot_id",
        "start_header_id",
        "end_header_id",
        "python_tag",
        "eom_id",
    }


def test_deepseek_and_mistral_like() -> None:
    bar, space = "\uff5c", "\u2581"
    end = f"<{bar}end{space}of{space}sentence{bar}>"
    call = f"<{bar}tool{space}calls{space}begin{bar}>"
    found = names_of(
        [end, f"<{bar}User{bar}>", call, f"<{bar}{space}pad{space}{bar}>"], eos_token=end
    )
    assert set(found.values()) == {"end_of_sentence", "User", "tool_calls_begin"}
    found = names_of(
        ["<s>", "</s>", "[INST]", "[/INST]", "[TOOL_CALLS]", "[control_8]"],
        bos_token="<s>",
        eos_token="</s>",
    )
    assert set(found.values()) == {"end_s", "INST", "end_INST", "TOOL_CALLS"}


def test_the_end_token_counts_whatever_else_it_is() -> None:
    same = {"eos_token": "<|x|>", "bos_token": "<|x|>", "pad_token": "<|x|>"}
    assert names_of(["<|x|>"], **same) == {"<|x|>": "x"}
    assert names_of(["<|user|>"], eos_token="c") == {"c": "c", "<|user|>": "user"}  # a plain word
    assert names_of(["<|user|>"]) == {"<|user|>": "user"}  # no end token at all


def test_what_the_template_writes_is_chosen() -> None:
    assert names_of(["<|zeta|>", "<|eta|>"], template="{{ '<|zeta|>' }}") == {"<|zeta|>": "zeta"}
    made = tokenizer(["<|zeta|>", "<|eta|>"], template="{{ '<|zeta|>' }}")
    assert special_tokens(made, template="{{ '<|eta|>' }}") == {4: "eta"}


def test_names_stay_apart_and_few() -> None:
    made = tokenizer(["<|user|>", "<user>", "[user]"])
    assert special_tokens(made) == {3: "user", 4: "user_4", 5: "user_5"}
    many = tokenizer([f"<|tool_{i}|>" for i in range(200)] + ["<|x|>"], eos_token="<|x|>")
    found = special_tokens(many)
    assert len(found) == MAX_TOKENS
    assert "x" in found.values()
    assert list(found) == sorted(found)


def test_the_small_base_model() -> None:
    import transformers

    from posttrain_dist.models import ModelConfig
    from posttrain_dist.models.folder import resolve

    made = transformers.AutoTokenizer.from_pretrained(resolve(ModelConfig().path))
    found = special_tokens(made)
    assert found == {0: "end", 2: "system", 3: "user", 4: "assistant"}  # padding is left out


@pytest.mark.parametrize(
    ("token", "name"),
    [
        ("<|im_end|>", "im_end"),
        ("</think>", "end_think"),
        ("[/INST]", "end_INST"),
        ("<end of turn>", "end_of_turn"),
        ("<a/b c>", "a_b_c"),
        ("<|>", ""),
        ("x" * 99, "x" * 40),
    ],
)
def test_metric_name(token: str, name: str) -> None:
    assert metric_name(token) == name


# ------------------------------------------------------------------------------ the sums


def micro_batches(count: int, seed: int = 0) -> list[dict[str, list]]:
    """Labels 0 to 9 with weights, losses and correctness; some fillers, one batch without rows."""
    draw = random.Random(seed)
    found = []
    for i in range(count):
        rows = 0 if i == 2 else draw.randint(1, 40)
        found.append(
            {
                "label": [draw.randint(0, 9) for _ in range(rows)],
                "weight": [draw.choice([0.0, 0.5, 1.0, 2.0]) for _ in range(rows)],
                "nll": [float(draw.randint(0, 64)) / 8 for _ in range(rows)],  # exact in binary
                "correct": [draw.random() < 0.4 for _ in range(rows)],
            }
        )
    return found


def by_hand(batches: list[dict[str, list]], token: int) -> list[float]:
    sums = [0.0] * 4
    for batch in batches:
        for label, weight, nll, correct in zip(*batch.values(), strict=True):
            if label == token:
                parts = (nll * weight, weight, correct and weight > 0, weight > 0)
                sums = [a + b for a, b in zip(sums, parts, strict=True)]
    return sums


def test_sums_of_each_token() -> None:
    batches = micro_batches(12)
    tokens = {9: "last", 0: "first", 4: "mid", 500: "never"}
    meter = SpecialTokenMeter(tokens, torch.device("cpu"))
    for batch in batches:
        loss = Loss(
            torch.tensor(0.0),
            torch.zeros(1, 4),
            nll_N=torch.tensor(batch["nll"], dtype=torch.float32),
            correct_N=torch.tensor(batch["correct"], dtype=torch.bool),
        )
        labels = torch.tensor(batch["label"], dtype=torch.int64)
        weights = torch.tensor(batch["weight"], dtype=torch.float32)
        meter.add(loss, SimpleNamespace(labels_N=labels, weight_N=weights))
    table_K4 = meter.flush()
    assert meter.names == ["first", "mid", "last", "never"]
    assert table_K4.tolist() == [by_hand(batches, token) for token in (0, 4, 9, 500)]
    assert meter.flush().abs().sum() == 0
    metrics = special_token_metrics(table_K4, meter.names)
    loss, weight, correct, count = by_hand(batches, 4)
    assert metrics["special_token_loss/mid"] == loss / weight
    assert metrics["special_token_accuracy/mid"] == correct / count
    assert 0 < correct < count
    assert not any("never" in key for key in metrics)
    held = special_token_metrics(table_K4, meter.names, prefix="eval_")
    assert held == {f"eval_{key}": value for key, value in metrics.items()}


def test_objectives_without_token_losses_add_nothing() -> None:
    meter = SpecialTokenMeter({1: "one"}, torch.device("cpu"))
    batch = SimpleNamespace(labels_N=torch.tensor([1]), weight_N=torch.ones(1))
    meter.add(Loss(torch.tensor(0.0), torch.zeros(1, 4)), batch)
    assert meter.flush().tolist() == [[0.0] * 4]
    nothing = SpecialTokenMeter({}, torch.device("cpu"))
    right = torch.ones(1, dtype=torch.bool)
    loss = Loss(torch.tensor(0.0), torch.zeros(1, 4), nll_N=torch.ones(1), correct_N=right)
    nothing.add(loss, batch)
    assert nothing.flush().shape == (0, 4)
    assert special_token_metrics(nothing.flush(), nothing.names) == {}


def test_ranks_add_up(run_workers, tmp_path) -> None:
    batches = micro_batches(7, seed=1)
    batches[2] = batches[3]
    path = tmp_path / "batches.json"
    path.write_text(json.dumps(batches))
    expected = [[7.0] * 4, by_hand(batches, 3), by_hand(batches, 7)]  # the channel's row on top
    for output in run_workers("sum_special_tokens.py", 2, str(path)):
        table, tokens, left, (train, held) = json.loads(output.splitlines()[-1])
        assert table == expected
        assert tokens == 7 * 5
        assert left == 0
        loss, weight, correct, count = by_hand(batches, 7)
        special = {"_loss/seven": loss / weight, "_accuracy/seven": correct / count}
        for row, prefix in ((train, ""), (held, "eval_")):
            for key, value in special.items():
                assert row[f"{prefix}special_token{key}"] == value
        assert train["train/loss"] == held["eval/loss"] == 1.0  # the channel's sums are all 7
