"""The benchmark of a DPO step: the same pairs for every arm, and the same losses."""

from __future__ import annotations

import math

import pytest


def test_pairs_are_as_described():
    from preferences_arms import counts, make_pairs
    from step_data import MAX_LENGTH, Sizes

    equal = counts(make_pairs(Sizes(), "equal", 2))
    assert equal == {
        "tokens_per_step": 8 * 2 * 256,
        "padding_factor": 1.0,
        "shared_factor": (256 + 77) / 512,  # a prompt of 179 tokens and two answers of 77
    }
    steps = make_pairs(Sizes(), "mixed", 20)
    assert steps == make_pairs(Sizes(), "mixed", 20)
    for pair in (pair for step in steps for pair in step):
        for answer in ("chosen_ids", "rejected_ids"):
            assert 2 <= len(pair[answer]) <= MAX_LENGTH - len(pair["prompt_ids"])
    said = counts(steps)
    assert said["padding_factor"] > 1.5 and 0.55 < said["shared_factor"] < 0.75


def test_our_arm_packs_every_pair_of_a_step_once_with_one_prompt():
    from preferences_arms import batches_of, make_pairs
    from step_data import Sizes

    (pairs,) = make_pairs(Sizes(), "mixed", 1)
    batches = batches_of(pairs, 1024)
    assert sorted(i for batch in batches for i in batch.sample_id_S) == list(range(3 * 8))
    wanted = [len(p[key]) for p in pairs for key in ("prompt_ids", "chosen_ids", "rejected_ids")]
    assert sum(batch.num_tokens for batch in batches) == sum(wanted)
    assert sum(batch.num_targets for batch in batches) == sum(
        len(p["chosen_ids"]) + len(p["rejected_ids"]) for p in pairs
    )


class Seen:
    def __init__(self) -> None:
        self.losses: list[float] = []

    def ready(self) -> None:
        """The model is there."""

    def done(self, loss: float, norm: float) -> None:
        self.losses.append(loss)


def test_the_losses_are_those_of_trl(tmp_path):
    pytest.importorskip("trl", reason="the peer is not installed")
    import preferences_arms
    import step_data

    preferences_arms.write(tmp_path, step_data.TINY, "mixed", 6)
    own, theirs = Seen(), Seen()
    preferences_arms.train(tmp_path, "ours", own)
    preferences_arms.train(tmp_path, "TRL 8 x 1", theirs)
    assert own.losses[0] == pytest.approx(math.log(2), abs=1e-6)
    assert own.losses == pytest.approx(theirs.losses, abs=1e-6) and len(own.losses) == 6


def test_our_arm_starts_at_ln_2_and_learns(tmp_path):
    import preferences_arms
    import step_data

    preferences_arms.write(tmp_path, step_data.TINY, "equal", 2)
    own = Seen()
    preferences_arms.train(tmp_path, "ours", own)
    assert own.losses[0] == pytest.approx(math.log(2), abs=1e-6) and own.losses[1] != own.losses[0]
