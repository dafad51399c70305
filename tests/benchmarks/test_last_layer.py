"""The last layer's benchmark: its arms compute the same, of the rows that they say."""

import json

import pytest
import torch


@pytest.fixture
def layer():
    from last_layer import SMOKE, make_layer

    return make_layer(SMOKE)


def test_a_pack_masks_the_first_tokens_of_each_sample(layer):
    from last_layer import make_pack

    pack = make_pack(layer, num_tokens=160, masked=0.75)
    real_N = [i for i in range(160) if i % 40 >= 30]
    assert pack.supervised_N.tolist() == real_N + [0] * 88
    assert not pack.grad_1ND[0, 40:].any() and pack.grad_1ND[0, :40].any(dim=1).all()
    assert pack.options["cu_seqlens"] == [0, 40, 80, 120, 160]


def test_arms_agree_and_leave_out_what_they_say(layer):
    from last_layer import ARMS, errors, make_pack
    from torch.utils.flop_counter import FlopCounterMode

    pack = make_pack(layer, num_tokens=1024, masked=0.875)  # N = 128
    apart = errors(layer, pack)
    assert list(apart) == list(ARMS)
    assert max(apart.values()) < 1e-5
    counted = {}
    for name, arm in ARMS.items():
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            arm(layer, pack)
        counted[name] = counter.get_total_flops()
    whole, mlp, attention = counted.values()
    left_out = 2 * (1024 - 128)
    assert whole - mlp == left_out * sum(p.numel() for p in layer.mlp.parameters())
    projections = (layer.self_attn.q_proj.weight, layer.self_attn.o_proj.weight)
    assert mlp - attention == left_out * sum(weight.numel() for weight in projections)


def test_a_wrong_arm_is_seen(layer, monkeypatch):
    import last_layer

    arms = {**last_layer.ARMS, "wrong": lambda *args: 1.01 * last_layer.mlp_rows(*args)}
    monkeypatch.setattr(last_layer, "ARMS", arms)
    apart = last_layer.errors(layer, last_layer.make_pack(layer, 160, 0.5))
    assert apart["wrong"] == pytest.approx(0.01, rel=0.01)


def test_gains_are_shares_of_the_layer_and_of_32(tmp_path, monkeypatch):
    import last_layer

    seconds = {"whole layer": [2.0, 4.0], "MLP rows": [1.0, 3.0], "q, o and MLP rows": [0.5, 1.0]}
    monkeypatch.setattr(
        last_layer.rows, "take_turns", lambda turns, **_: {turn: seconds[turn[0]] for turn in turns}
    )
    arguments = ["--smoke", "--tokens=160", "--masks", "0.5", f"--results={tmp_path}"]
    monkeypatch.setattr("sys.argv", ["last_layer.py", *arguments])
    last_layer.main()
    lines = (tmp_path / "last_layer.jsonl").read_text().splitlines()
    table = {row["arm"]: row for row in map(json.loads, lines)}
    assert [row["layer_gain"] for row in table.values()] == [0.0, 0.375, 0.75]
    assert table["q, o and MLP rows"]["step_gain"] == 0.75 / 32
    assert table["MLP rows"]["computed"] == 128
