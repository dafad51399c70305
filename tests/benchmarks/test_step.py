"""The step's benchmark: the same samples for every arm, and the losses of a plain loop."""

import sys

import pytest


def test_samples_are_as_described():
    from step_data import IGNORED, Sizes, counts, make_steps

    steps = make_steps(Sizes(), "mixed", 20)
    assert steps == make_steps(Sizes(), "mixed", 20)
    for samples in steps:
        lengths = [len(s.input_ids) for s in samples]
        assert len(samples) == 8
        assert lengths == sorted(lengths, reverse=True)
        assert max(lengths) <= 1024
    said = counts(steps)
    tokens = sum(len(s.input_ids) for step in steps for s in step)
    assert said["tokens_per_step"] == tokens / 20
    assert said["supervised_share"] == pytest.approx(0.3, abs=0.01)
    assert said["padding_factor"] > 1.5
    uniform = counts(make_steps(Sizes(), "uniform", 2))
    assert uniform == {
        "tokens_per_step": 8 * 256,
        "supervised_share": 255 / 256,
        "padding_factor": 1.0,
    }
    assert IGNORED == -100


def test_our_arm_packs_every_sample_of_a_step_once():
    from step_arms import GivenSteps
    from step_data import Sizes, make_steps

    steps = make_steps(Sizes(), "mixed", 2)
    batches = GivenSteps(steps, pack_tokens=1024).step(2)
    assert all(batch.num_tokens <= 1024 for batch in batches)
    ids = sorted(i for batch in batches for i in batch.sample_id_S)
    assert ids == list(range(8))
    weight = sum(batch.weight_sum for batch in batches)
    assert weight == sum(x != -100 for s in steps[1] for x in s.labels[1:])


@pytest.mark.parametrize("arm", ["ours", "ours, no channels", "TRL 2 x 4"])
def test_an_arm_trains_as_the_plain_loop_does(tmp_path, arm):
    if arm.startswith("TRL"):
        pytest.importorskip("trl", reason="the peer is not installed")
    import step_arms
    import step_data
    import torch

    from posttrain_dist.build import pick_dtype
    from posttrain_dist.config import Dtype

    step_data.write(tmp_path, step_data.TINY, "mixed", 4)
    truth, own = Seen(), Seen()
    step_arms.train(tmp_path, "reference", truth)
    step_arms.train(tmp_path, arm, own)
    assert truth.ready_at == own.ready_at == 0
    assert len(own.losses) == 4
    # Where the machine multiplies bfloat16 fast, that is what our arm chooses.
    coarse = arm.startswith("ours") and pick_dtype(Dtype.auto) is torch.bfloat16
    assert own.losses == pytest.approx(truth.losses, rel=3e-4 if coarse else 1e-5)
    assert own.norms == pytest.approx(truth.norms, rel=3e-2 if coarse else 1e-4)
    assert len(set(truth.losses)) == 4
    assert min(truth.norms) > 0


def test_the_floor_makes_every_product_of_a_weight_and_no_other(tmp_path):
    """The head and the last layer's MLP meet supervised rows, all other matrices every token."""
    import step_arms
    import step_data
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import LlamaForCausalLM

    sizes = step_data.TINY
    step_data.write(tmp_path, sizes, "mixed", 2)
    seen = Seen()
    with FlopCounterMode(display=False) as counter:
        step_arms.train(tmp_path, "products, float32", seen)
    assert len(seen.losses) == 2
    steps = step_data.read(tmp_path)
    tokens = sum(len(s.input_ids) for step in steps for s in step)
    supervised = sum(x != -100 for step in steps for s in step for x in s.labels[1:])
    expected, last = 0, f"layers.{sizes.layers - 1}.mlp"
    for name, weight in LlamaForCausalLM(step_data.llama_config(sizes)).named_parameters():
        if weight.ndim == 2 and "embed" not in name:
            rows = supervised if last in name or "lm_head" in name else tokens
            expected += 3 * 2 * weight.numel() * rows
    assert counter.get_total_flops() == expected


class Seen:
    """Takes what an arm says."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.norms: list[float] = []
        self.ready_at = -1

    def ready(self) -> None:
        self.ready_at = len(self.losses)

    def done(self, loss: float, norm: float) -> None:
        self.losses.append(loss)
        self.norms.append(norm)


CHILD = """
import sys
print('{}', flush=True)
for seconds in (9.0, 2.0, 6.0, 3.0):
    if not sys.stdin.readline():
        sys.exit()
    if sys.argv[2] == "breaks":
        sys.exit("it broke")
    times = {"ours": 1, "reference": 2, "TRL 1 x 8, compiled": 3}[sys.argv[2]]
    print('{"seconds": %f, "cpu_s": 2, "loss": %f, "norm": 1, "peak_bytes": %d}'
          % (seconds * times, 2 - times / 10, 8 * times), flush=True)
"""


def test_steps_are_compared_one_by_one_and_a_broken_arm_is_told(tmp_path, monkeypatch):
    import step
    import step_arms

    script = tmp_path / "child.py"
    script.write_text(CHILD)
    monkeypatch.setattr(step_arms, "__file__", str(script))
    monkeypatch.setattr(sys, "argv", ["step.py", "--steps=4", "--warmup=1"])
    arguments = step.parse()
    arguments.arms = ["reference", "ours", "TRL 1 x 8, compiled", "breaks"]
    children = step.run(arguments, tmp_path)
    made = [step.row_of(arguments, c, children, [10, 20, 30, 60]) for c in children.values()]
    truth, ours, trl, broken = made
    assert ours["p50_s"] == 3.0
    assert ours["tokens_per_s"] == 10.0  # of 20 / 2, 30 / 6 and 60 / 3
    assert (ours["ours_times_faster"], trl["ours_times_faster"]) == (1.0, 3.0)
    assert trl["role"] == "tuned"
    assert trl["ours_share_of_memory"] == pytest.approx(1 / 3)
    assert trl["loss_error"] == pytest.approx(0.1 / 1.8)
    assert truth["loss_error"] == 0
    assert broken == {"arm": "breaks", "failed": "it broke"}
