"""Which fallback is taken, with which settings, and what comes after it."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
from planned_runs import LADDER, OFFLOAD, needs, planned, room, smallest

from posttrain_dist.config import (
    AdamW,
    AutoTuning,
    DeepSpeed,
    Full,
    Hardware,
    Lora,
    Quantize,
    Ray,
    Single,
    TrainConfig,
    complete,
)
from posttrain_dist.errors import ConfigError
from posttrain_dist.models import Checkpointing
from posttrain_dist.planner.fallbacks import (
    choose,
    following,
    miss,
    nearest,
    reasons,
    try_all,
    with_choice,
)
from posttrain_dist.planner.machine import find_machine
from posttrain_dist.planner.methods import methods
from posttrain_dist.planner.plan_file import plan_entry, read_choice, read_plan, write_plan
from posttrain_dist.planner.search import Search


def test_the_order_is_that_of_the_fallbacks():
    assert [method.name for method in methods(*planned())] == LADDER
    alone = ["full", "full + CPU offload", "LoRA", "QLoRA", "QLoRA + paged optimizer"]
    assert [method.name for method in methods(*planned(gpus=1))] == alone
    named = [method.name for method in methods(*planned(tuning=Lora()))]
    assert named == ["LoRA ZeRO-1", "LoRA ZeRO-2", "LoRA ZeRO-3", "LoRA ZeRO-3 + CPU offload"]


SAMPLE = ("full ZeRO-2", "full ZeRO-3 + CPU offload", LADDER[-1])  # the others are slow


@pytest.mark.parametrize(
    "expected", [n if n in SAMPLE else pytest.param(n, marks=pytest.mark.slow) for n in LADDER]
)
def test_the_first_that_fits_is_taken_and_none_before_it_could(expected):
    """Each before it fails with its own smallest settings, found here without the search."""
    config, machine = planned(**room(expected))
    choice = choose(config, machine)
    assert choice.chosen.name == expected and choice.chosen.plan.fits
    search = Search(config, machine)
    for method in methods(config, machine)[: LADDER.index(expected)]:
        assert not any(plan.fits for plan in smallest(search, method)), method.name
    assert [each.name for each in choice.tried] == LADDER


def test_what_is_named_stays():
    tried = try_all(*planned(tuning=Lora(rank=8)))
    words = [word for each in tried if each.plan for word in each.plan.overrides]
    assert not [word for word in words if word.startswith(("tuning", "optimizer.lr"))]
    tried = try_all(*planned(engine=DeepSpeed(stage=2)))
    words = [word for each in tried if each.plan for word in each.plan.overrides]
    assert not [word for word in words if word.startswith("engine")]
    assert [each.name for each in tried] == ["full", "LoRA", "QLoRA"]
    config, machine = planned(tuning=Full(), engine=DeepSpeed(stage=3))
    (given,) = try_all(config, machine)
    assert given.plan.overrides == () and with_choice(config, given) == config


@pytest.mark.parametrize(
    "more", [1.02, 1.06, *(pytest.param(more, marks=pytest.mark.slow) for more in (1.2, 10.0))]
)
def test_micro_batch_and_recomputed_layers_are_the_fastest_that_fit(more):
    """Against every combination of them, for one engine."""
    config, machine = planned(
        more * needs()["full ZeRO-2"], tuning=Full(), engine=DeepSpeed(stage=2)
    )
    search = Search(config, machine)
    (method,) = methods(config, machine)
    found = search.fastest(method).plan
    best = 0.0
    for micro in (1, 2):
        for layers in range(5):
            mode = {0: "none", 4: "full"}.get(layers, "selective")
            words = [f"model.activation_checkpointing={mode}"]
            words += [f"model.checkpoint_layers={layers}"] if mode == "selective" else []
            plan = search.plan((f"train.micro_batch_size={micro}", *words))
            best = max(best, plan.speed.tokens_per_s) if plan.fits else best
    assert found.fits and found.speed.tokens_per_s >= 0.995 * best


def test_length_batch_and_precision_are_never_changed():
    tried = [*try_all(*planned(5.0)), *try_all(*planned(5.0, gpus=1))]
    keys = {word.partition("=")[0] for each in tried if each.plan for word in each.plan.overrides}
    chosen = {"tuning", "engine", "optimizer.lr", "optimizer.paged", "cluster.workers"}
    settings = {"train.micro_batch_size", "model.activation_checkpointing"}
    assert keys <= chosen | settings | {"model.checkpoint_layers"}


def test_settings_that_were_typed_stay():
    typed = planned(20.0, train=TrainConfig(batch_size=8, micro_batch_size=2))
    choice = choose(*typed)
    assert with_choice(typed[0], choice.chosen).train.micro_batch_size == 2
    config, machine = planned(30.0)
    keys = {"train.micro_batch_size", "model.activation_checkpointing"}
    chosen = with_choice(config, choose(config, machine, typed=keys).chosen)
    assert chosen.train.micro_batch_size == 1
    assert chosen.model.activation_checkpointing is Checkpointing.none


@pytest.mark.parametrize(
    ("lr_for", "full", "lora"), [("full", 3e-6, Lora.default_lr), ("lora", Full.default_lr, 3e-6)]
)
def test_a_learning_rate_belongs_to_the_tuning_that_it_was_typed_for(lr_for, full, lora):
    for name, expected in (("full ZeRO-1", full), ("LoRA", lora)):
        config, machine = planned(**room(name), optimizer=AdamW(lr=3e-6, lr_for=lr_for))
        assert with_choice(config, choose(config, machine).chosen).optimizer.lr == expected


def test_what_tuning_auto_says_of_lora_reaches_it():
    config, machine = planned(
        **room("LoRA"), tuning=AutoTuning(rank=64, targets=["q_proj", "v_proj"])
    )
    tuning = with_choice(config, choose(config, machine).chosen).tuning
    assert (tuning.rank, list(tuning.targets)) == (64, ["q_proj", "v_proj"])


def test_a_start_after_one_that_ran_out_of_memory_promises_less():
    config, machine = planned(30.0)
    choice, seen = choose(config, machine), []
    while choice is not None:
        seen.append((choice.chosen.name, choice.chosen.plan.device.total_bytes))
        assert choice.chosen.plan.fits
        choice = following(choice)
    names, sizes = zip(*seen, strict=True)
    places = [LADDER.index(name) for name in names]
    assert places == sorted(places) and places[-1] >= LADDER.index("LoRA")
    assert all(after <= 0.95 * before for before, after in pairwise(sizes))
    # What was to fit and did not is said as that, never as memory that is missing.
    last = following(following(choose(config, machine)))
    said = [reason for reason in reasons(last) if " was to fit, and ran out of memory" in reason]
    assert said and not [reason for reason in reasons(last) if ": -" in reason]
    # From the settings of one choice to those of the next: nothing of the first is left.
    first = choose(config, machine)
    second = following(first)
    again = with_choice(complete(with_choice(config, first.chosen)), second.chosen)
    assert complete(again) == complete(with_choice(config, second.chosen))


def test_plan_json_holds_the_choice(tmp_path):
    choice = choose(*planned(**room("full ZeRO-3")))
    write_plan(tmp_path, choice)
    assert read_choice(tmp_path) == choice
    assert read_plan(tmp_path)["plan"]["overrides"] == list(choice.chosen.plan.overrides)
    after = following(choice)
    write_plan(tmp_path, after)
    assert read_choice(tmp_path) == after
    entry = plan_entry(choice)
    before = LADDER[: LADDER.index(choice.chosen.name)]
    assert [reason.partition(":")[0] for reason in entry["reasons"]] == before
    assert read_choice(tmp_path / "none") is None


def test_nothing_fits_names_the_smallest_miss_and_what_helps():
    with pytest.raises(ConfigError) as refused:
        choose(*planned(1.5))
    assert "GiB are missing on a GPU of 1.5 GiB" in str(refused.value)
    assert "--largest data.max_length" in str(refused.value)


def test_a_miss_has_the_bytes_of_the_place_that_it_names():
    plan = choose(*planned(64)).chosen.plan
    both = replace(plan, capacity_bytes=2 << 30, host_capacity_bytes=1 << 20)
    host = replace(plan, host_capacity_bytes=1 << 20)
    assert min(both.spare_bytes, both.host_spare_bytes) < 0 <= host.spare_bytes
    assert miss(both).startswith(
        f"{-both.spare_bytes / 2**30:,.1f} GiB are missing on a GPU of 2.0"
    )
    lacks = -host.host_spare_bytes / 2**30
    assert miss(host).startswith(f"{lacks:,.1f} GiB are missing on a host of 0.0")


def test_instead_of_what_does_not_fit_stands_its_own_method_first():
    full = planned(**room("full ZeRO-3"), tuning=Full(), engine=DeepSpeed(stage=3))
    assert not choose(*full).chosen.plan.fits
    found = nearest(*full)
    assert found.plan.fits and not [word for word in found.plan.overrides if "tuning" in word]
    small = planned(**room("LoRA"), tuning=Full(), engine=DeepSpeed(stage=1))
    assert nearest(*small).name == "LoRA"


def test_a_fallback_that_costs_more_than_it_saves_is_warned_of():
    (lora,) = try_all(*planned(tuning=Lora(), engine=DeepSpeed(stage=3)))
    assert "ZeRO-3 costs more than it saves: with engine=zero1" in lora.plan.warnings[0]
    (cheap,) = try_all(*planned(tuning=Lora(), engine=DeepSpeed(stage=1)))
    assert cheap.plan.warnings == ()
    (needed,) = try_all(
        *planned(**room(OFFLOAD), tuning=Full(), engine=DeepSpeed(stage=3, offload=True))
    )
    assert not [text for text in needed.plan.warnings if "offload" in text]


def test_what_is_not_possible_is_refused_by_name(tmp_path):
    eight_bits = planned(tuning=Full(), optimizer=AdamW(state_bits=8))
    tried = try_all(*eight_bits)
    assert all(each.plan is None and "optimizer.state_bits" in each.refused for each in tried)
    with pytest.raises(ConfigError, match="no fallback is possible"):
        choose(*eight_bits)


def test_an_adapter_on_several_gpus_takes_the_engine_that_is_fastest():
    config, machine = planned(80.0)
    tried = {each.name: each for each in try_all(config, machine)}
    chosen = with_choice(config, tried["LoRA"])
    assert chosen.engine == DeepSpeed(stage=1)
    assert with_choice(config, tried[LADDER[-1]]).engine == Single()
    assert with_choice(config, tried[LADDER[-1]]).tuning.quantize is Quantize.nf4


def test_a_cpu_has_no_offload_and_no_pages():
    config = replace(planned()[0], hardware=Hardware(), cluster=Ray(workers=2))
    names = [method.name for method in methods(config, find_machine(config, plans_only=True))]
    assert names == ["full ZeRO-1", "full ZeRO-2", "full ZeRO-3", "LoRA", "QLoRA"]
