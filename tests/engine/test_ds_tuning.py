"""ZeRO settings by size and device, and that they train what plain torch trains."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import pytest
from torch import nn

from posttrain_dist.engine import DeepSpeed
from posttrain_dist.engine.ds_config import deepspeed_config
from posttrain_dist.engine.ds_tuning import (
    Sizes,
    loading_zero,
    set_local_size,
    tuned_zero,
)
from posttrain_dist.errors import ConfigError


def llama(hidden: int, intermediate: int, layers: int, vocab: int, kv: int) -> Sizes:
    """Sizes by arithmetic: q, k, v, o, three of the MLP, two norms; embedding, head, last norm."""
    attention = 2 * hidden * hidden + 2 * hidden * kv
    layer = attention + 3 * hidden * intermediate + 2 * hidden
    total = layers * layer + 2 * vocab * hidden + hidden
    return Sizes(total, layer, hidden * intermediate, ("LlamaDecoderLayer",))


SMALL = llama(256, 768, 8, 8192, 256)
B1 = llama(2048, 8192, 16, 128_256, 512)
B7 = llama(4096, 11_008, 32, 32_000, 4096)
B70 = llama(8192, 28_672, 80, 128_256, 1024)


def test_sizes_are_those_of_the_whole_parameters():
    layers = [nn.Linear(4, 3), nn.Linear(4, 3)]
    policy = nn.Sequential(*layers, nn.Embedding(9, 4))
    shard = layers[0].weight
    shard.ds_numel = 1000  # under ZeRO-3 the tensor itself is a shard
    policy[2].weight.requires_grad_(False)
    assert Sizes.of(policy, layers, policy[2]) == Sizes(
        parameters=1000 + 3 + 12 + 3,
        layer=1003,
        tensor=1000,
        layer_classes=("Linear",),
        embeddings_trained=False,
    )


@pytest.mark.parametrize(
    ("sizes", "elements"),
    [(SMALL, 1_000_000), (B1, B1.parameters // 32), (B7, B7.parameters // 32), (B70, 250_000_000)],
)
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_gpu_overlaps_about_32_buckets_of_at_most_half_a_gigabyte(sizes, elements, stage):
    chosen = tuned_zero(stage, sizes, world=2, cpu=False, offload=False)
    assert chosen["overlap_comm"] is True and chosen["reduce_bucket_size"] == elements
    assert not {"contiguous_gradients", "reduce_scatter"} & chosen.keys()
    assert loading_zero(stage, cpu=False) == {}
    alone = tuned_zero(stage, sizes, world=1, cpu=False, offload=False)
    assert alone == {**chosen, "overlap_comm": False}  # nothing to overlap: no second buffer


@pytest.mark.parametrize(("sizes", "whole"), [(SMALL, True), (B1, False), (B7, False)])
def test_only_small_layers_are_gathered_at_once(sizes, whole):
    for cpu in (True, False):
        chosen = tuned_zero(3, sizes, world=2, cpu=cpu, offload=False)
        assert chosen.get("leaf_module") == ({"classes": ["LlamaDecoderLayer"]} if whole else None)
    assert "leaf_module" not in tuned_zero(2, sizes, world=2, cpu=True, offload=False)
    frozen = replace(sizes, embeddings_trained=False)
    assert "leaf_module" not in tuned_zero(3, frozen, world=2, cpu=True, offload=False)


def test_a_cpu_copies_and_moves_as_little_as_it_can():
    for stage in (1, 2):
        assert tuned_zero(stage, SMALL, world=2, cpu=True, offload=False) == {
            "reduce_bucket_size": 1_000_000,
            "overlap_comm": False,
            "contiguous_gradients": False,
        }
    chosen = tuned_zero(3, B1, world=2, cpu=True, offload=False)
    # Every tensor of a layer fits into a bucket.
    assert chosen["reduce_bucket_size"] == 2048 * 8192
    assert chosen["reduce_scatter"] is False and chosen["overlap_comm"] is False
    assert loading_zero(3, cpu=True) == {"memory_efficient_linear": False}
    assert loading_zero(2, cpu=True) == {}
    # With offload DeepSpeed keeps its own way of copying gradients.
    assert tuned_zero(2, SMALL, world=2, cpu=True, offload=True).keys() == {
        "reduce_bucket_size",
        "overlap_comm",
    }
    assert tuned_zero(0, SMALL, world=2, cpu=True, offload=False) == {}


def test_the_launcher_may_say_how_many_devices_a_node_has():
    environment: dict[str, str] = {}
    set_local_size(environment)
    assert environment == {"LOCAL_SIZE": "1"}
    environment = {"LOCAL_SIZE": "8"}
    set_local_size(environment)
    assert environment == {"LOCAL_SIZE": "8"}


def test_the_mean_over_ranks_may_not_be_turned_into_a_sum(tmp_path):
    """Our loss is multiplied by the ranks: a sum would train at `world` times the rate."""
    path = tmp_path / "ds.json"
    path.write_text('{"gradient_allreduce_op": "sum"}')
    with pytest.raises(ConfigError, match=r"gradient_allreduce_op \(set engine\)"):
        deepspeed_config(DeepSpeed(stage=1, config=str(path)), clip=1.0, bf16=False)


def test_kept_memory_costs_no_page_faults_after_the_first_steps():
    """Blocks of 3 to 80 MB, freed and taken again in every step: 53,000 pages, or none."""
    script = (
        "import resource, sys, torch\n"
        "from posttrain_dist.engine.memory import keep_freed_memory\n"
        "if sys.argv[1] == 'kept': assert keep_freed_memory()\n"
        "def fill(mib): return torch.empty(mib * 2**18).fill_(1.0)\n"
        "def step():\n"
        "    a, b, small = fill(64), fill(40), [fill(3) for _ in range(20)]\n"
        "    del a, small\n"
        "    return fill(80)\n"
        "def faults(): return resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "for _ in range(4): step()\n"
        "found = []\n"
        "for _ in range(5):\n"  # the least: the kernel may take pages back between two of them
        "    before = faults()\n"
        "    step()\n"
        "    found.append(faults() - before)\n"
        "print(min(found))\n"
    )

    def faults(way: str) -> int:
        command = [sys.executable, "-c", script, way]
        return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    assert faults("kept") < 1000
    assert faults("stock") > 20_000


@pytest.fixture(scope="module")
def cases(builders, run_workers, tmp_path_factory):
    """name -> what the two ranks tell of it."""
    folder = tmp_path_factory.mktemp("sharded")
    zero = {"reduce_bucket_size": 5_000, "leaf_module": {"classes": []}, "reduce_scatter": True}
    (folder / "ds.json").write_text(json.dumps({"zero_optimization": zero}))
    model = builders.model(folder / "llama", tie_word_embeddings=False)
    outputs = run_workers("step_sharded.py", 2, str(model), str(folder / "ds.json"))
    told = [json.loads(x.split("TOLD ")[1].splitlines()[0]) for x in outputs]
    return {name: [rank[name] for rank in told] for name in told[0]}


@pytest.mark.parametrize("name", ["plain", "recomputed", "frozen", "own json"])
def test_every_way_of_gathering_trains_what_plain_torch_trains(cases, name):
    for rank in cases[name]:
        for key in ("losses", "norms"):
            assert rank["sharded"][key] == pytest.approx(rank["single"][key], rel=5e-6)
        assert rank["distance"] <= 1e-5 * rank["size"]
        assert rank["moved"] > 1e-3 * rank["size"]  # a hundred times further


def test_layers_are_gathered_whole_unless_their_input_has_no_gradient(cases):
    leaves = {name: len(ranks[0]["leaves"]) for name, ranks in cases.items()}
    assert leaves == {"plain": 2, "recomputed": 2, "frozen": 0, "own json": 0}


def test_the_users_own_json_wins(cases):
    chosen = {name: (ranks[0]["bucket"], ranks[0]["scatter"]) for name, ranks in cases.items()}
    assert chosen["own json"] == (5_000, True) and chosen["plain"] == (1_000_000, False)
