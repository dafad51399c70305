"""Step times: closed forms of small cases, and what has to hold for any run."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from posttrain_dist.config import (
    AdamW,
    DeepSpeed,
    Hardware,
    Local,
    Lora,
    Quantize,
    RunConfig,
    Sft,
    Single,
    Slurm,
)
from posttrain_dist.config.hardware import with_nodes
from posttrain_dist.models import Attention, Checkpointing, ModelConfig
from posttrain_dist.planner.job import DataFacts, Job
from posttrain_dist.planner.machine import find_machine
from posttrain_dist.planner.make_job import make_job
from posttrain_dist.planner.speed.rates import rates_of
from posttrain_dist.planner.speed.step_time import speed_of, step_time
from posttrain_dist.planner.speed.work import keys_seen, micro_batch, model_flops
from posttrain_dist.tuning.base import Tuning
from posttrain_dist.tuning.full import Full

LLAMA_8B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
}
LINEARS = 32 * (4096 * (4096 + 1024 + 1024 + 4096) + 3 * 4096 * 14336)
HEAD = 4096 * 128256
H100 = Hardware(
    gpu="h100",
    gpus_per_node=8,
    host_memory_gib=1800,
    cpus_per_node=96,
    network_gb_s=50,
    storage_gb_s=5,
)


@pytest.fixture
def make(tmp_path):
    """A job of an 8B Llama on H100s."""

    def build(
        gpus: int = 8,
        length: int = 4096,
        micro: int = 1,
        packs: int | None = None,
        facts: DataFacts | None = None,
        tuning: Tuning | None = None,
        stage: int = 3,
        offload: bool = False,
        recomputed: int = 0,
        hardware: Hardware = H100,
        model: dict[str, Any] | None = None,
        **model_values: Any,
    ) -> Job:
        values = {**LLAMA_8B, **(model or {})}
        (tmp_path / "config.json").write_text(json.dumps(values))
        mode = Checkpointing.selective if recomputed else Checkpointing.none
        alone = gpus == 1
        config = RunConfig(
            model=ModelConfig(
                path=str(tmp_path),
                activation_checkpointing=mode,
                checkpoint_layers=recomputed or None,
                **model_values,
            ),
            objective=Sft(),
            tuning=tuning or Full(),
            optimizer=AdamW(lr=1e-4),
            engine=Single() if alone else DeepSpeed(stage=stage, offload=offload),
            cluster=Local() if alone else Slurm(nodes=-(-gpus // 8), gpus_per_node=min(gpus, 8)),
            hardware=hardware,
        )
        config.cluster = with_nodes(config.cluster, hardware)
        config.data.max_length = length
        config.train.micro_batch_size = micro
        config.train.batch_size = packs or gpus * micro
        return make_job(config, find_machine(config, plans_only=True), facts)

    return build


def data(tokens: int = 10**9, supervised: float = 1.0, longest: int = 4096) -> DataFacts:
    return DataFacts(
        tokens=tokens,
        supervised=round(tokens * supervised),
        longest=longest,
        channels=1,
        heldout_tokens=0,
    )


def products(job: Job) -> float:
    batch = micro_batch(job)
    return (batch.forward.products + batch.backward.products) / job.row_tokens


# ------------------------------------------------------------------------------- closed forms


def test_products_are_six_of_each_weight_four_of_a_frozen_one_and_two_more_run_again(make):
    head = HEAD  # its gradients are made in forward
    assert products(make()) == 6 * (LINEARS + head)
    assert products(make(recomputed=32)) == 8 * LINEARS + 6 * head
    assert products(make(recomputed=8)) == 6.5 * LINEARS + 6 * head
    rank = 16
    inserted = 32 * rank * ((4096 + 4096) * 2 + (4096 + 1024) * 2 + (4096 + 14336) * 3)
    lora = make(gpus=1, tuning=Lora(rank=rank))
    assert products(lora) == 4 * (LINEARS + head) + 6 * inserted
    again = make(gpus=1, tuning=Lora(rank=rank), recomputed=32)
    assert products(again) == 6 * LINEARS + 4 * head + 8 * inserted


def test_head_and_last_mlp_are_of_supervised_tokens_only(make):
    facts = data(supervised=0.25)
    mlp = 3 * 4096 * 14336
    assert products(make(facts=facts)) == 6 * (LINEARS - 0.75 * mlp + 0.25 * HEAD)


def test_a_token_attends_to_those_before_it_in_its_sample_and_window():
    for sample, window in ((1, None), (7, None), (7, 3), (7, 7), (7, 100), (64, 1)):
        seen = sum(min(i + 1, window or sample) for i in range(sample)) / sample
        assert keys_seen(sample, window) == pytest.approx(seen)


def test_attention_is_two_products_forward_and_five_backward(make):
    for facts, longest in ((None, 4096), (data(longest=512), 512)):
        job = make(facts=facts)
        batch = micro_batch(job)
        pair = 2 * 32 * 128 * (longest + 1) / 2  # of one token and layer
        assert batch.forward.attention == pytest.approx(32 * 4096 * 2 * pair)
        assert batch.backward.attention == pytest.approx(2.5 * batch.forward.attention)


def test_model_flops_are_those_of_the_parameters_and_of_causal_attention(make):
    attention = 6 * 2 * 32 * 32 * 128 * (4096 + 1) / 2
    assert model_flops(make()) == pytest.approx(6 * (LINEARS + HEAD) + attention, rel=1e-4)
    # A tied head multiplies, though its weight is the embedding's.
    tied = make(model={"tie_word_embeddings": True})
    assert model_flops(tied) == model_flops(make())


def test_frozen_weights_have_no_gradient_in_the_share_of_the_peak(make):
    less = model_flops(make()) - model_flops(make(tuning=Lora()))
    assert less == pytest.approx(2 * (LINEARS + HEAD), rel=1e-4)


def test_weights_in_nf4_are_made_whole_for_every_pass(make):
    plain, packed = (
        micro_batch(make(gpus=1, tuning=Lora(rank=8, quantize=quantize), recomputed=32))
        for quantize in (Quantize.none, Quantize.nf4)
    )
    once = LINEARS * (0.53 + 2)
    assert packed.forward.moved - plain.forward.moved == pytest.approx(once, rel=1e-6)
    assert packed.backward.moved - plain.backward.moved == pytest.approx(2 * once, rel=1e-6)


def test_an_update_reads_and_writes_the_state_of_its_own_parameters(make):
    parameters = make().network.num_parameters
    # Gradients twice, in 16 bits; float32 master and moments, both ways; the new weight; the rest.
    num_bytes = 2 * 2 + 2 * 12 + 2 + 2 + 8
    for gpus, stage, owners in ((8, 3, 8), (8, 1, 8), (8, 0, 1)):
        job = make(gpus=gpus, stage=stage)
        expected = parameters / owners * num_bytes / rates_of(job).memory
        assert step_time(job).terms["update"] == pytest.approx(expected, rel=1e-6)


def test_a_collective_is_bound_by_links_inside_a_node_and_by_ports_between_nodes(make):
    slow = dataclasses.replace(H100, network_gb_s=12.5)
    assert rates_of(make(gpus=8)).collective == 0.8 * 450e9
    assert rates_of(make(gpus=16)).collective == 0.8 * 8 * 50e9
    assert rates_of(make(gpus=16, hardware=slow)).collective == 0.8 * 8 * 12.5e9


# --------------------------------------------------------------------------- what always holds


def tokens_per_s(job: Job) -> float:
    return speed_of(job).tokens_per_s


def test_more_gpus_are_faster_together_and_slower_each(make):
    counts = (8, 16, 64, 256, 1024)
    speeds = [tokens_per_s(make(gpus=gpus)) for gpus in counts]
    each = [speed / gpus for speed, gpus in zip(speeds, counts, strict=True)]
    assert speeds == sorted(speeds)
    assert each == sorted(each, reverse=True)


def test_the_same_step_on_more_gpus_takes_no_longer_and_costs_more(make):
    plans = [speed_of(make(gpus=gpus, packs=1024)) for gpus in (8, 32, 128, 1024)]
    steps = [plan.step_s for plan in plans]
    assert steps == sorted(steps, reverse=True)
    costs = [plan.gpu_hours for plan in plans]
    assert costs == sorted(costs)


def test_a_slow_network_binds_and_a_larger_micro_batch_hides_it(make):
    slow = dataclasses.replace(H100, network_gb_s=1.25)
    small, large = (speed_of(make(gpus=16, micro=n, hardware=slow)) for n in (1, 32))
    assert small.binds == "network"
    assert large.binds == "compute"
    assert large.tokens_per_s > 5 * small.tokens_per_s


def test_longer_samples_attend_more(make):
    lengths = (1024, 4096, 16384, 65536)
    speeds = [tokens_per_s(make(length=n, micro=65536 // n)) for n in lengths]
    assert speeds == sorted(speeds, reverse=True)
    assert speeds[0] > 2 * speeds[-1]


@pytest.mark.parametrize(
    ("slower", "faster"),
    [
        ({"recomputed": 32}, {"recomputed": 16}),
        ({"recomputed": 16}, {}),
        ({}, {"compile": True}),
        ({"offload": True}, {}),
        ({"recomputed": 32, "checkpoint_offload": True}, {"recomputed": 32}),
        ({"tuning": Lora(dora=True)}, {"tuning": Lora()}),
        ({}, {"tuning": Lora()}),
        ({"gpus": 1, "tuning": Lora(quantize=Quantize.nf4)}, {"gpus": 1, "tuning": Lora()}),
        ({"attention": Attention.eager}, {}),
        ({"packs": 64, "stage": 2}, {"packs": 64, "stage": 1}),
        ({"packs": 64, "stage": 3}, {"packs": 64, "stage": 1}),
    ],
    ids=lambda values: "-".join(values) or "plain",
)
def test_what_computes_or_sends_more_is_slower(make, slower, faster):
    assert step_time(make(**slower)).step_s > step_time(make(**faster)).step_s


def test_the_whole_run_is_its_tokens_or_a_billion(make):
    known = speed_of(make(facts=data(tokens=5 * 10**8)))
    unknown = speed_of(make())
    assert (known.tokens, unknown.tokens) == (5 * 10**8, None)
    assert known.hours * 2 == pytest.approx(unknown.hours)
    assert unknown.hours * 3600 * unknown.tokens_per_s == pytest.approx(10**9)
    assert unknown.gpu_hours == 8 * unknown.hours
    assert unknown.tokens_per_step == 8 * 4096


def test_a_step_is_longer_than_its_longest_term_and_shorter_than_their_sum(make):
    for values in ({}, {"gpus": 64}, {"gpus": 1}, {"offload": True}, {"stage": 2, "packs": 64}):
        time = step_time(make(**values))
        overlaps = 1.3
        assert max(time.terms.values()) <= time.step_s <= overlaps * sum(time.terms.values())


def test_checkpoints_are_written_by_all_nodes_together(make):
    one, four = (speed_of(make(gpus=gpus)) for gpus in (8, 32))
    assert one.checkpoint_s == pytest.approx(4 * four.checkpoint_s, rel=0.02)
    # Weights, master and moments of 8 billion parameters at 5 GB/s.
    assert one.checkpoint_s == pytest.approx(8.03 * 12 / 5, rel=0.2)
    assert 0.9 < four.effective_share < one.effective_share < 1
    assert four.checkpoint_every_s < one.checkpoint_every_s


def test_a_cpu_has_a_time_too(make):
    cpu = Hardware(gpus_per_node=0, host_memory_gib=64, cpus_per_node=16)
    few = make(gpus=1, hardware=cpu)
    many = make(gpus=1, hardware=dataclasses.replace(cpu, cpus_per_node=64))
    assert few.machine.gpu is None
    assert tokens_per_s(few) < tokens_per_s(many) < tokens_per_s(make(gpus=1)) / 5
