"""The benchmark of shared prompts: both arms train on the same, and its count is that of torch."""

import json
from dataclasses import replace

import pytest
import torch


def test_both_arms_have_the_same_loss_and_gradient():
    from shared_prompt import CASES, SMOKE, make_model, make_rows, step

    policy = make_model(SMOKE, torch.device("cpu"))
    for answers in CASES.values():
        found = []
        for batch in make_rows(SMOKE, answers).values():
            loss = step(policy, batch)
            gradients = [p.grad.clone().flatten() for p in policy.parameters()]
            found.append(torch.cat([loss[None], *gradients]))
        shared, repeated = found
        assert float((shared - repeated).norm()) <= 1e-6 * float(repeated.norm())


@pytest.mark.parametrize("arm", ["shared", "repeated"])
def test_multiply_adds_are_those_that_torch_counts(arm):
    from shared_prompt import SMOKE, make_model, make_rows, multiply_adds, step
    from torch.utils.flop_counter import FlopCounterMode

    sizes = replace(SMOKE, sequence=80, row=1280)  # targets fill a multiple of 128
    policy, batch = make_model(sizes, torch.device("cpu")), make_rows(sizes, 8)[arm]
    assert batch.num_targets == len(batch.labels_N) == 384
    with FlopCounterMode(display=False) as counter:
        step(policy, batch)
    counted = {
        str(name).removeprefix("aten."): flops / 2
        for name, flops in counter.get_flop_counts()["Global"].items()
    }
    products = sum(counted.get(name, 0) for name in ("mm", "addmm"))
    expected = multiply_adds(sizes, batch)
    assert products == pytest.approx(expected["layers"] + expected["head"], rel=1e-3)


def test_a_gain_is_held_against_the_ratio_of_multiply_adds(tmp_path, monkeypatch):
    import shared_prompt

    seconds = {"shared": [1.0, 2.0, 1.0], "repeated": [2.0, 3.0, 2.0]}
    monkeypatch.setattr(
        shared_prompt.rows, "take_turns", lambda turns, **_: {t: seconds[t[1]] for t in turns}
    )
    monkeypatch.setattr("sys.argv", ["shared_prompt.py", "--smoke", f"--results={tmp_path}"])
    shared_prompt.main()
    lines = (tmp_path / "shared_prompt.jsonl").read_text().splitlines()
    table = {(row["case"], row["arm"]): row for row in map(json.loads, lines)}
    group = table["groups of 8", "shared"]
    assert group["times_faster"] == 2.0
    assert group["reached"] == pytest.approx(2.0 / group["work_ratio"])
    # Sequences of 20 tokens, 14 of them the prompt.
    assert group["token_ratio"] == 8 * 20 / (14 + 8 * 6)
    assert table["pairs", "repeated"]["reached"] == 1.0
