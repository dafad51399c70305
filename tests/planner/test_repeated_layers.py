"""Equal layers that are counted take what the same layers take when each is replayed."""

import pytest

from posttrain_dist.config import DeepSpeed, Dtype, Full, Lora, RunConfig, Single, Slurm, complete
from posttrain_dist.models import Checkpointing
from posttrain_dist.planner.job import Machine
from posttrain_dist.planner.make_job import make_job
from posttrain_dist.planner.memory.layers import repeated
from posttrain_dist.planner.memory.phases import device_phases

NODE = Machine(
    gpu="h100",
    gpus_per_node=8,
    gpu_memory_bytes=80 << 30,
    host_memory_bytes=1 << 40,
    cpus_per_node=96,
    link_bytes_s=4e11,
    network_bytes_s=5e10,
    host_link_bytes_s=5e10,
    storage_bytes_s=1e10,
    node_failure_s=7e7,
    margin=0.04,
)


def phases(model, tuning, engine, checkpoint_layers):
    config = RunConfig(name="planned", tuning=tuning, engine=engine)
    if not isinstance(engine, Single):
        config.cluster = Slurm(nodes=2)
    config.model.path = f"shape:{model}"
    config.data.train, config.data.max_length = "embedded", 4096
    config.train.dtype, config.train.batch_size = Dtype.bfloat16, 64
    if checkpoint_layers:
        config.model.activation_checkpointing = Checkpointing.selective
        config.model.checkpoint_layers = checkpoint_layers
    return device_phases(make_job(complete(config), NODE))


def check(monkeypatch, *case):
    counted = phases(*case)
    monkeypatch.setattr(repeated, "_LEAST", 10**6)
    device_phases.cache_clear()
    replayed = phases(*case)
    device_phases.cache_clear()
    assert [phase.name for phase in counted] == [phase.name for phase in replayed]
    for ours, full in zip(counted, replayed, strict=True):
        assert ours.allocated_bytes == pytest.approx(full.allocated_bytes, rel=5e-4), ours.name


@pytest.mark.parametrize(
    ("tuning", "engine"), [(Lora, Single()), (Full, DeepSpeed(stage=2)), (Full, DeepSpeed(stage=3))]
)
def test_counted_and_replayed_layers_agree(monkeypatch, tuning, engine):
    check(monkeypatch, "qwen3-8b", tuning(), engine, 30)


@pytest.mark.parametrize(
    "pattern", ["(1.|20)[.].*", "([4-9]|3[0-5])[.].*", "2[0-9][.]self_attn[.].*"]
)
@pytest.mark.parametrize("engine", [Single(), DeepSpeed(stage=1), DeepSpeed(stage=3)])
def test_layers_that_are_trained_differently_are_not_alike(monkeypatch, pattern, engine):
    tuning = Full(train=f"model.layers.{pattern}")
    check(monkeypatch, "qwen3-8b", tuning, engine, 14)


def test_a_bucket_that_is_fullest_between_the_ends_is_seen(monkeypatch):
    # Layers of 1.6 GiB of gradients in buckets of 1 GB: replayed, 4 GiB more than at the ends.
    check(monkeypatch, "llama3-70b", Full(), DeepSpeed(stage=2), 80)


@pytest.mark.slow
@pytest.mark.parametrize("tuning", [Full, Lora])
@pytest.mark.parametrize("engine", [Single(), *(DeepSpeed(stage=stage) for stage in range(4))])
@pytest.mark.parametrize("checkpoint_layers", [0, 20, 32])
def test_every_engine_agrees(monkeypatch, tuning, engine, checkpoint_layers):
    check(monkeypatch, "llama3-8b", tuning(), engine, checkpoint_layers)
