"""The micro-batch that a rehearsal tries, beside a look at every one of the run."""

from __future__ import annotations

import random
from itertools import pairwise

import numpy as np
import pytest

from posttrain_dist.data import MixBy
from posttrain_dist.data.packs.heaviest import RowMemory
from posttrain_dist.data.packs.loader import PackedSource
from posttrain_dist.data.packs.mixing import Mixture, SourceSpec
from posttrain_dist.data.prepared.arrays import Examples, SplitWriter, flatten
from posttrain_dist.flow import Example
from posttrain_dist.objectives.sft import Sft

LENGTH = 40


@pytest.fixture(scope="module")
def examples(tmp_path_factory) -> Examples:
    """Samples of lengths that do not fill packs, so that these differ."""
    draw, folder = random.Random(7), tmp_path_factory.mktemp("heaviest")
    with SplitWriter(folder / "samples") as writer:
        for i in range(160):
            length = draw.choice([7, 11, 13, 17, 19, 23])
            weight = np.ones(length, np.float32)
            weight[: draw.randrange(1, length)] = 0
            ids = np.arange(length, dtype=np.int32)
            one = Example(ids, weight, channel=0, sample_id=i)
            writer.append(flatten([one]), source=i % 2)
    return Examples.open(folder, "all", channels=["a"])


def source(examples, rank, world, micro, batch_size=6, mixture=None) -> PackedSource:
    return PackedSource(
        examples,
        Sft(),
        max_length=LENGTH,
        window=32,
        seed=3,
        batch_size=batch_size,
        micro_batch_size=micro,
        rank=rank,
        world=world,
        mixture=mixture,
    )


def squares(batch) -> int:
    return sum((end - start) ** 2 for start, end in pairwise(batch.cu_seqlens_S))


@pytest.mark.parametrize("epochs", [0.5, 2.0])
@pytest.mark.parametrize(("world", "micro"), [(1, 1), (3, 1), (1, 2), (2, 2), (1, 6)])
def test_no_micro_batch_of_the_run_is_heavier(examples, world, micro, epochs):
    ranks = [source(examples, rank, world, micro) for rank in range(world)]
    for each in ranks:
        steps = each.total_steps(epochs=epochs)
    run = [b for each in ranks for k in range(1, steps + 1) for b in each.step(k)]
    updates = ranks[0].heaviest(steps, RowMemory(pairs=True))
    found = [update[0] for update in updates]
    assert max(b.num_tokens for b in found) == max(b.num_tokens for b in run)
    assert max(map(squares, found)) == max(map(squares, run))
    fullest = [b for b in run if b.num_tokens == max(b.num_tokens for b in run)]
    assert max(b.num_targets for b in found) == max(b.num_targets for b in run)
    most, *_ = ranks[-1].heaviest(steps)
    assert most[0].num_tokens == fullest[0].num_tokens
    assert most[0].sample_id_S in [b.sample_id_S for b in fullest], "it is one of the run"
    if micro == 1:
        # Of several with as many tokens the one with the longer samples and more targets.
        longest, targets = max(map(squares, run)), max(b.num_targets for b in run)
        ties = [squares(b) / longest + b.num_targets / targets for b in fullest]
        place = [b.sample_id_S for b in fullest].index(most[0].sample_id_S)
        assert ties[place] == pytest.approx(max(ties))
    # Two in an update where the run adds gradients up.
    assert {len(update) for update in updates} == {2 if 6 // world > micro else 1}


def test_every_phase_of_a_mixture_is_looked_at(tmp_path):
    """Source 1 alone fills packs (twice 20 tokens; of source 0 three times 11), from step 5 on."""
    with SplitWriter(tmp_path / "samples") as writer:
        for i in range(80):
            ids = np.arange(20 if i % 2 else 11, dtype=np.int32)
            one = Example(ids, np.ones(len(ids), np.float32), channel=0, sample_id=i)
            writer.append(flatten([one]), source=i % 2)
    examples = Examples.open(tmp_path, "all", channels=["a"])
    names = {"a": {1: 1.0, 5: 0.0}, "b": {1: 0.0, 5: 1.0}}
    specs = [SourceSpec(name=name, schedule=weights) for name, weights in names.items()]
    mix = Mixture(examples.sources, examples.supervised, specs, MixBy.rows, seed=3)
    each = source(examples, 0, 1, 1, mixture=mix)
    assert each.heaviest(4)[0][0].num_tokens == 33
    assert each.heaviest(9)[0][0].num_tokens == 40
