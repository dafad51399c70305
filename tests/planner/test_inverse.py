"""An inverse answer fits, and the next value does not."""

from __future__ import annotations

import pytest
from planned_runs import planned

from posttrain_dist.config import DataConfig, DeepSpeed, Full, Lora, Single, TrainConfig
from posttrain_dist.errors import ConfigError
from posttrain_dist.planner import make_plan
from posttrain_dist.planner.inverse import MOST_GPUS, STEPS, fewest, gpu_words, largest
from posttrain_dist.planner.memory.phases import device_phases
from posttrain_dist.planner.methods import Method, methods
from posttrain_dist.planner.search import Search

LEAST = ("model.activation_checkpointing=full",)


@pytest.mark.parametrize(
    ("key", "gib", "slots"),
    [
        ("data.max_length", 9.0, {"tuning": Full(), "engine": DeepSpeed(stage=2)}),
        pytest.param(
            *("data.max_length", 5.0, {"tuning": Lora(), "engine": Single()}),
            marks=pytest.mark.slow,
        ),
        (
            "train.micro_batch_size",
            8.0,
            {
                "tuning": Lora(),
                "engine": DeepSpeed(stage=1),
                "train": TrainConfig(batch_size=256),
            },
        ),
        ("tuning.rank", 4.0, {"tuning": Lora(), "engine": Single()}),
    ],
)
def test_the_largest_value_fits_and_the_next_does_not(key, gib, slots):
    config, machine = planned(gib, **slots)
    (answer,) = largest(config, machine, key)
    assert answer.value and not answer.bounded and answer.plan.fits
    assert f"{key}={answer.value}" in answer.plan.overrides
    search = Search(config, machine)
    one = ("train.micro_batch_size=1",) if key != "train.micro_batch_size" else ()
    after = answer.value + STEPS[key]
    assert search.plan((f"{key}={answer.value}", *one, *LEAST)).fits
    assert not search.plan((f"{key}={after}", *one, *LEAST)).fits


def test_the_positions_of_the_model_are_the_longest_context_there_is():
    config, machine = planned(80.0, shape="shape:llama3-8b", tuning=Lora(), engine=Single())
    (answer,) = largest(config, machine, "data.max_length")
    assert (answer.value, answer.bounded) == (8192, True)


@pytest.mark.slow
def test_each_fallback_has_its_own_longest_context():
    answers = {each.name: each for each in largest(*planned(3.3, gpus=1), "data.max_length")}
    assert answers["full"].value is None and not answers["full"].plan.fits
    assert 0 < answers["LoRA"].value < answers["QLoRA"].value


def test_the_fewest_gpus_fit_and_one_less_does_not():
    slots = {"tuning": Full(), "engine": DeepSpeed(stage=3), "data": DataConfig(max_length=1024)}
    config, machine = planned(7.0, gpus=8, **slots)
    (answer,) = fewest(config, machine)
    search, least = Search(config, machine), ("train.micro_batch_size=1", *LEAST)
    assert answer.value > 1 and answer.plan.fits and answer.plan.workers == answer.value
    assert search.plan((*gpu_words(config, machine, answer.value), *least)).fits
    fewer = answer.value - 1 if answer.value <= 8 else answer.value - 8
    assert not search.plan((*gpu_words(config, machine, fewer), *least)).fits


def test_all_packs_at_once_may_fit_where_one_after_the_other_does_not():
    """They add up no gradients: a quarter of the state is never there beside the activations."""
    slots = {"tuning": Full(), "engine": Single(), "train": TrainConfig(batch_size=2)}
    slots["data"] = DataConfig(max_length=512)
    typed = ["model.activation_checkpointing"]
    config, machine = planned(80.0, gpus=1, **slots)
    search = Search(config, machine, typed=typed)
    one, both = (search.plan((f"train.micro_batch_size={size}",)) for size in (1, 2))
    between = (one.device.total_bytes + both.device.total_bytes) / 2 / 0.96
    assert both.device.total_bytes < one.device.total_bytes
    config, machine = planned(between / 2**30, gpus=1, **slots)
    search = Search(config, machine, typed=typed)
    assert not search.plan(("train.micro_batch_size=1",)).fits
    (answer,) = largest(config, machine, "train.micro_batch_size", typed=typed)
    assert (answer.value, answer.plan.fits) == (2, True)
    (method,) = methods(config, machine)
    fastest = search.fastest(method).plan
    assert fastest.fits and "train.micro_batch_size=2" in fastest.overrides
    assert search.fits(method)


def test_the_fewest_gpus_are_found_where_more_ranks_take_more_of_a_host():
    slots = {"tuning": Full(), "engine": DeepSpeed(stage=1), "data": DataConfig(max_length=512)}
    config, machine = planned(80.0, gpus=8, **slots)
    search = Search(config, machine)
    hosts = {n: search.plan(gpu_words(config, machine, n)).host.total_bytes for n in range(1, 9)}
    assert hosts[2] < hosts[8]
    between = (hosts[2] + hosts[8]) / 2 / 2**30
    fullest = search.plan(gpu_words(config, machine, 2)).device.total_bytes / 0.96 / 2**30
    config, machine = planned(1.01 * fullest, gpus=8, host_gib=between, **slots)
    (answer,) = fewest(config, machine)
    fits = [
        n for n in range(1, 9) if Search(config, machine).plan(gpu_words(config, machine, n)).fits
    ]
    assert 1 < answer.value <= min(fits) < 8 and answer.plan.fits


def test_the_largest_rank_is_one_that_the_layers_have():
    config, machine = planned(80.0, shape="shape:llama3-8b", tuning=Lora(), engine=Single())
    (answer,) = largest(config, machine, "tuning.rank")
    assert (answer.value, answer.bounded) == (1024, True)  # keys and values: 4096 -> 1024
    mlp = {"tuning": Lora(targets="mlp"), "engine": Single()}
    (answer,) = largest(*planned(2000.0, shape="shape:llama3-8b", **mlp), "tuning.rank")
    assert (answer.value, answer.bounded) == (4096, True)


def test_several_nodes_are_counted_whole():
    slots = {"tuning": Full(), "engine": DeepSpeed(stage=3), "data": DataConfig(max_length=512)}
    config, machine = planned(5.5, gpus=2, **slots)
    (answer,) = fewest(config, machine)
    assert answer.value % 2 == 0 and answer.value > 2
    assert f"cluster.nodes={answer.value // 2}" in answer.plan.overrides


def test_only_what_can_be_asked_for_is_answered():
    with pytest.raises(ConfigError, match=r"use one of data\.max_length"):
        largest(*planned(), "optimizer.lr")


@pytest.fixture
def replayed(monkeypatch):
    """Workers of each run that is replayed."""
    found = []

    def noted(job):
        found.append(job.workers)
        return device_phases(job)

    monkeypatch.setattr(make_plan, "device_phases", noted)
    return found


def test_what_has_no_room_for_its_own_weights_is_replayed_only_to_say_what_it_lacks(replayed):
    config, machine = planned(1.5, gpus=8, tuning=Full(), engine=DeepSpeed(stage=1))
    (answer,) = fewest(config, machine)
    assert answer.value is None and not answer.plan.fits
    assert replayed == [MOST_GPUS]


def test_a_way_that_cannot_fit_is_not_replayed_beside_one_that_does(replayed):
    slots = {"tuning": Lora(), "data": DataConfig(max_length=256)}
    config, machine = planned(14.0, gpus=8, shape="shape:llama3-8b", **slots)
    search = Search(config, machine)
    ways = (("engine=zero1",), ("engine=zero2",), ("engine=zero3",))
    found = search.leanest(Method("LoRA", ways))
    assert found.plan.fits and "engine=zero3" in found.plan.overrides
    assert len(replayed) == 1
