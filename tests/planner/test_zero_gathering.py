"""What ZeRO-3 has whole: small steps by hand, and the settings that DeepSpeed itself parses."""

from __future__ import annotations

import json
import random
from dataclasses import replace

import pytest
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from zero_plan import plan_job, zero_config, zero_job

from posttrain_dist.config import DeepSpeed, Full, Lora
from posttrain_dist.planner.memory.engines import base
from posttrain_dist.planner.memory.engines.ds_settings import zero_settings
from posttrain_dist.planner.memory.engines.gathered import Gathered
from posttrain_dist.planner.memory.engines.gathering import Call, held_elements, own_elements
from posttrain_dist.planner.memory.ledger import Ledger
from posttrain_dist.planner.memory.phases import device_phases
from posttrain_dist.planner.plan import Item, PhaseName

SIZES = {"a": 10, "b": 20, "c": 30, "d": 40}
STEP = [Call((name,), backward=False) for name in "abcd"]
STEP += [Call((name,), backward=True) for name in "dcba"]


@pytest.fixture(scope="module")
def settings():
    return zero_settings(plan_job("llama3-8b", DeepSpeed(stage=3), Full(), gpus=8))


def test_without_looking_ahead_one_module_is_whole_at_a_time(settings):
    alone = replace(settings, prefetch_bucket_size=0, max_reuse_distance=0)
    held = held_elements(STEP, SIZES, alone)
    assert [each.running for each in held] == [10, 20, 30, 40, 40, 30, 20, 10]
    assert [each.after for each in held] == [0] * 8


def test_what_is_used_again_soon_stays(settings):
    # Between d's forward and its backward there is nothing, between c's two uses 80 elements.
    near = replace(settings, prefetch_bucket_size=0, max_reuse_distance=81)
    held = held_elements(STEP, SIZES, near)
    assert [each.running for each in held] == [10, 20, 30, 70, 70, 30, 20, 10]


def test_a_small_model_is_whole_between_forward_and_backward(settings):
    held = held_elements(STEP, SIZES, settings)
    assert held[3].after == held[4].running == sum(SIZES.values())
    assert held[-1].after == 0


def test_fetching_ahead_goes_on_until_enough_is_whole(settings):
    # While a runs, b is fetched (20 of at most 15 at a time); while b runs, c.
    ahead = replace(settings, prefetch_bucket_size=15, max_reuse_distance=0)
    held = held_elements(STEP, SIZES, ahead)
    assert [each.running for each in held][:3] == [10 + 20, 20 + 30, 30 + 40]
    full = replace(ahead, max_live_parameters=10)
    assert [each.running for each in held_elements(STEP, SIZES, full)][:3] == [10, 20, 30]


def test_what_is_gathered_together_is_copied_out_of_one_tensor(settings):
    alone = replace(settings, prefetch_bucket_size=0, max_reuse_distance=0)
    layer = [Call(("a", "b"), backward=False), Call(("a", "b"), backward=True)]
    held = held_elements(layer, {"a": 10, "b": 20}, alone)
    assert [(each.fetching, each.running, each.after) for each in held] == [(60, 30, 0)] * 2


def test_while_the_order_is_not_known_it_is_as_without_looking_ahead(settings):
    alone = replace(settings, prefetch_bucket_size=0, max_reuse_distance=0)
    steps = [*STEP, Call((), backward=True), Call(("a", "small", "c"), backward=True)]
    assert own_elements(steps, SIZES) == held_elements(steps, SIZES, alone)


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("backward", [False, True])
def test_modules_of_a_layer_at_once_take_what_they_take_one_by_one(known, backward):
    job = plan_job("llama3-70b", DeepSpeed(stage=3), Lora(rank=8), gpus=8)
    names = ["self_attn.q_proj", "self_attn.o_proj", "input_layernorm", "mlp.up_proj"]
    ends = [f"{name}.weight" if "norm" in name else f"{name}.base_layer.weight" for name in names]
    calls = tuple(base.Call((end,), ()) for end in (ends[::-1] if backward else ends))
    layers = [f"model.layers.{i}." for i in (5, 6, 7)]
    rng, phases = random.Random(7), []
    for _ in range(20):
        taken = [rng.choice((0, rng.randrange(10**9))) for _ in range(2 * len(calls) + 1)]
        for at_once in (False, True):
            ledger = Ledger()
            gathered = Gathered(job, ledger, zero_settings(job))
            if known:
                gathered.know_order()
            gathered.before(("model.embed_tokens.weight",), backward=False)
            gathered.after()
            with ledger.phase(PhaseName.backward if backward else PhaseName.forward):
                for prefix in reversed(layers) if backward else layers:
                    if at_once:
                        gathered.run(prefix, calls, taken, backward=backward)
                        continue
                    beside = iter(taken)
                    for call in calls:
                        ledger.touch(Item.activations, next(beside))
                        gathered.before([prefix + n for n in call.gathers], backward=backward)
                        ledger.touch(Item.activations, next(beside))
                        gathered.after()
                    ledger.touch(Item.activations, next(beside))
            phases.append((ledger.phases(), ledger.total_bytes))
    assert phases[::2] == phases[1::2]
    assert any(found[0].items.get(Item.activations) for (found, _) in phases)


def test_a_tied_weight_is_whole_once(tmp_path):
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 32_768}
    values = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **sizes}
    values |= {"tie_word_embeddings": True, "max_position_embeddings": 2048}
    (tmp_path / "config.json").write_text(json.dumps(values))
    job = zero_job(zero_config(tmp_path, {"stage": 3, "accumulation": 2}, 2))
    phases = {phase.name: phase.items for phase in device_phases(job)}
    # The head is the last that runs: nothing is left of the tensor that all came in.
    most = 4 * job.network.num_parameters
    assert phases[PhaseName.forward][Item.gathered] <= most
    # One gradient of it: of the first micro-batch a shard alone stays.
    assert phases[PhaseName.evaluate].get(Item.head, 0) < 4 * 256 * 32_768


def test_settings_are_those_that_deepspeed_parses(tmp_path, settings):
    own = {"reduce_bucket_size": 7_000_000, "stage3_prefetch_bucket_size": 0, "overlap_comm": False}
    file = tmp_path / "ds.json"
    file.write_text(json.dumps({"zero_optimization": own}))
    for engine in (
        DeepSpeed(stage=2),
        DeepSpeed(stage=3, persistence_threshold=7),
        DeepSpeed(stage=3, config=str(file)),
    ):
        ours = zero_settings(plan_job("llama3-8b", engine, Full(), gpus=8))
        given = own if engine.config else {"overlap_comm": True, "reduce_bucket_size": 250_000_000}
        theirs = DeepSpeedZeroConfig(
            stage=engine.stage,
            stage3_param_persistence_threshold=engine.persistence_threshold,
            **given,
        )
        for name in (
            *("contiguous_gradients", "reduce_scatter", "reduce_bucket_size", "overlap_comm"),
            *("sub_group_size", "prefetch_bucket_size", "max_live_parameters"),
            *("max_reuse_distance", "param_persistence_threshold"),
        ):
            assert getattr(ours, name) == getattr(theirs, name), name
        assert ours.efficient_linear == theirs.memory_efficient_linear


def test_a_lower_bound_on_what_is_whole_saves_what_it_says(tmp_path):
    # The head of a 70B is its largest tensor: 2.1 GB; by default more is fetched meanwhile.
    file = tmp_path / "ds.json"
    file.write_text(json.dumps({"zero_optimization": {"stage3_max_live_parameters": 0}}))

    def gathered(config):
        job = plan_job("llama3-70b", DeepSpeed(stage=3, config=config), Lora(rank=8), gpus=8)
        phases = {phase.name: phase for phase in device_phases(job)}
        return phases[PhaseName.backward].items[Item.gathered]

    head = 2 * 128_256 * 8192
    assert head <= gathered(str(file)) < 1.1 * head
    assert gathered(None) > head


def test_on_one_rank_shards_are_whole(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64}
    config |= {"intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 500}))
    alone, two = (
        device_phases(zero_job(zero_config(folder, {"stage": 3}, world))) for world in (1, 2)
    )
    assert all(phase.items.get(Item.gathered, 0) == 0 for phase in alone[1:3])
    assert any(phase.items.get(Item.gathered, 0) for phase in two[1:3])
