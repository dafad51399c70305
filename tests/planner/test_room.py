"""What a program does on the GPU where there is room, and else in host memory, stops no run.

DeepSpeed flattens the weights of stages 1 and 2, and `models/parity.py` computes its reference,
on a GPU that has room for it (runtime/zero/stage_1_and_2.py of 0.19.8: flatten_on_accelerator).
"""

from __future__ import annotations

from dataclasses import replace

import pytest
from zero_plan import plan_job

from posttrain_dist.config import DeepSpeed, Full, Lora, Quantize, Single
from posttrain_dist.models import Weights
from posttrain_dist.planner.make_plan import make_plan
from posttrain_dist.planner.memory.host import host_context_bytes, host_phases, resuming_bytes
from posttrain_dist.planner.memory.phases import device_phases
from posttrain_dist.planner.plan import Choice, Item, PhaseName, Tried
from posttrain_dist.planner.plan_file import read_choice, write_plan

GIB = 1 << 30


def with_gpu(job, gib, **machine):
    node = replace(job.machine, gpu_memory_bytes=int(gib * GIB), margin=0.04, **machine)
    return replace(job, machine=node)


def loading(job):
    return next(phase for phase in device_phases(job) if phase.name is PhaseName.load)


def of_host(job):
    phase = next(phase for phase in host_phases(job) if phase.name is PhaseName.load)
    return phase.items.get(Item.loading, 0)


@pytest.mark.parametrize("stage", [1, 2])
def test_flat_weights_are_made_where_there_is_room(stage):
    job = plan_job("qwen2.5-14b", DeepSpeed(stage=stage), Full(), gpus=8, workers=64)
    weights = 2 * job.network.num_parameters
    large, small = loading(with_gpu(job, 80)), loading(with_gpu(job, 45))
    # With room, weights and flat weights at once: 2 + 2 bytes a parameter.
    assert large.allocated_bytes + large.if_room == pytest.approx(2 * weights, rel=0.01)
    assert large.on_host == 0
    # Without, the same is held by the host, once for each of its ranks, and the GPU has it once.
    assert small.on_host == pytest.approx(2 * weights, rel=0.01)
    assert small.allocated_bytes + small.if_room < 45 * GIB
    assert of_host(with_gpu(job, 80)) == 0
    assert of_host(with_gpu(job, 45)) == 8 * small.on_host


def test_weights_of_two_thirds_of_a_gpu_fit():
    job = plan_job("qwen2.5-14b", DeepSpeed(stage=2), Full(), gpus=8, workers=64)
    plan = make_plan(with_gpu(job, 45, gpu="l40s", host_memory_bytes=1000 * GIB))
    assert plan.fits
    assert plan.device.total_bytes < 45 * GIB < 4 * job.network.num_parameters
    # Eight ranks hold 2 x 27.5 GiB each while the GPUs are too small: 440 GiB.
    assert not make_plan(with_gpu(job, 45, gpu="l40s", host_memory_bytes=420 * GIB)).fits
    assert make_plan(with_gpu(job, 80, host_memory_bytes=420 * GIB)).fits


@pytest.mark.parametrize("tuning", [Lora(rank=16), Lora(rank=16, quantize=Quantize.nf4)])
def test_what_fits_fits_in_more_memory_too(tuning):
    # The start-up check of a head of 128k rows takes 3 GiB, where they are free.
    job = plan_job("llama3.1-8b", Single(), tuning, gpus=1)
    sizes = (5, 7, 8, 9, 11, 16, 17.5, 19, 21.5, 24)
    plans = [make_plan(with_gpu(job, gib)) for gib in sizes]
    fits = [plan.fits for plan in plans]
    assert fits == sorted(fits)
    assert 0 < sum(fits) < len(fits)
    spare = [plan.spare_bytes for plan in plans]
    assert spare == sorted(spare)
    assert PhaseName.load not in {plan.device.peak.name for plan in plans}


def test_the_reference_of_the_head_goes_to_the_host():
    job = plan_job("llama3.1-8b", Single(), Lora(rank=16), gpus=1)
    head, logits = 128_256 * 4096, 256 * 128_256 * 4
    wide = loading(with_gpu(job, 80))
    # The weight in float32 and three times the logits of 256 rows; less what was needed anyway.
    assert 0 < wide.if_room <= 4 * head + 3 * logits
    assert wide.on_host == 0
    full = loading(with_gpu(job, 17))
    assert full.if_room == 0
    assert full.on_host >= 2 * head + 4 * head + 3 * logits
    assert of_host(with_gpu(job, 17)) == full.on_host


def test_offload_makes_a_copy_of_its_part_on_the_gpu():
    # `.detach().clone().to("cpu")`: of one rank the whole, which no other way leads around.
    job = plan_job("llama3-8b", DeepSpeed(stage=2, offload=True), Full(), gpus=1)
    weights = 2 * job.network.num_parameters
    assert loading(with_gpu(job, 24)).allocated_bytes == pytest.approx(2 * weights, rel=0.01)
    eight = plan_job("llama3-8b", DeepSpeed(stage=2, offload=True), Full(), gpus=8)
    assert loading(with_gpu(eight, 24)).allocated_bytes < 1.3 * weights


def test_stage_3_takes_its_shards_through_the_host():
    # `defragment`: a buffer of all shards of a rank.
    job = plan_job("llama3-70b", DeepSpeed(stage=3), Full(), gpus=8, workers=32)
    assert of_host(job) == pytest.approx(2 * job.network.num_parameters / 4, rel=0.01)
    lora = plan_job("llama3-70b", DeepSpeed(stage=3), Lora(rank=8), gpus=8, workers=32)
    assert of_host(lora) == 8 * 4 * 128_256 * 8192  # the largest tensor, in float32


def test_random_weights_are_made_on_the_host_by_every_rank():
    job = plan_job("llama3-8b", DeepSpeed(stage=2), Full(), gpus=8)
    job = replace(job, model=replace(job.model, weights=Weights.random))
    assert of_host(job) == 8 * 2 * job.network.num_parameters
    sharded = plan_job("llama3-8b", DeepSpeed(stage=3), Full(), gpus=8)
    random = replace(sharded, model=replace(sharded.model, weights=Weights.random))
    assert of_host(random) == of_host(sharded)


def test_a_plan_file_keeps_both(tmp_path):
    job = with_gpu(plan_job("qwen2.5-14b", DeepSpeed(stage=2), Full(), gpus=8, workers=64), 45)
    tried = Tried("full ZeRO-2", make_plan(job))
    write_plan(tmp_path, Choice((tried,), tried))
    read = read_choice(tmp_path)
    assert read.chosen.plan == tried.plan
    assert read.chosen.plan.device.phases[0].on_host > 0


def test_a_host_that_could_not_read_a_checkpoint_is_warned_of():
    # Each of 8 ranks reads all weights (stage 2), or its part of 12 bytes a parameter (stage 3).
    flat = plan_job("llama3-8b", DeepSpeed(stage=2), Full(), gpus=8)
    sharded = plan_job("llama3-8b", DeepSpeed(stage=3), Full(), gpus=8, workers=16)
    count, programs = flat.network.num_parameters, host_context_bytes(flat)
    assert resuming_bytes(flat) - programs == pytest.approx(8 * 2 * count)
    assert resuming_bytes(sharded) - programs == pytest.approx(8 * 12 * count / 16)
    lora = plan_job("llama3-8b", DeepSpeed(stage=2), Lora(rank=8), gpus=8)
    alone = plan_job("llama3-8b", Single(), Full(), gpus=1)
    assert resuming_bytes(lora) == resuming_bytes(alone) == 0
    for gib, said in ((100, True), (200, False)):
        warned = make_plan(with_gpu(flat, 80, host_memory_bytes=gib * GIB)).warnings
        assert any("go on from a checkpoint" in text for text in warned) is said
