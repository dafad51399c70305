"""The rows of prepared data that a plan counts, beside a look at every row of the run."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import pairwise

import pytest

from posttrain_dist.build import make_source
from posttrain_dist.config import (
    DataConfig,
    DeepSpeed,
    Dtype,
    Full,
    Hardware,
    Lora,
    ModelConfig,
    Prefix,
    Prompt,
    Ray,
    RunConfig,
    TrainConfig,
    complete,
)
from posttrain_dist.data.packs.heaviest import RowMemory
from posttrain_dist.data.prepared.arrays import Examples
from posttrain_dist.dist import Process
from posttrain_dist.models import Attention
from posttrain_dist.models.folder import read_shape
from posttrain_dist.planner.job import DataFacts
from posttrain_dist.planner.machine import find_machine
from posttrain_dist.planner.make_job import make_job
from posttrain_dist.planner.memory.layers.row_attention import groups_of
from posttrain_dist.planner.memory.phases import device_phases
from posttrain_dist.prepare import prepare

TOKENS, LENGTH = 16, 256
END = {"epochs": 1.0}


@pytest.fixture(scope="module")
def prepared(tiny_llama, builders, tmp_path_factory):
    """A long prompt, long answers, many short rows: (config, folder, facts)."""
    draw, folder = random.Random(5), tmp_path_factory.mktemp("packed")
    sizes = [(120, 2), *[(4, 46)] * 4, *[(45, 5)] * 40, *[(4, 3)] * 120]  # of question and answer
    rows = [
        builders.chat(*("".join(draw.choices("abcdefgh", k=n)) for n in (size, answer)), "say")
        for size, answer in sizes
    ]
    data = DataConfig(train=str(builders.write(folder / "rows.jsonl", rows)), max_length=LENGTH)
    config = RunConfig(model=ModelConfig(path=str(tiny_llama)), data=data)
    config.train = TrainConfig(dtype=Dtype.float32, batch_size=4, **END)
    prepare(complete(config), folder / "prepared")
    return config, folder / "prepared", DataFacts.read(folder / "prepared")


def variant(config, world=1, attention=Attention.sdpa, tuning=None, **train) -> RunConfig:
    end = {"epochs": None} if "steps" in train else {}
    engine = DeepSpeed(stage=0) if world > 1 else config.engine
    return complete(
        replace(
            config,
            model=replace(config.model, attention=attention),
            tuning=tuning or Full(),
            engine=engine,
            cluster=Ray(workers=world) if world > 1 else config.cluster,
            train=replace(config.train, **end, **train),
            hardware=Hardware(gpus_per_node=0, cpus_per_node=4, host_memory_gib=64),
        )
    )


def rows_of_the_run(config, folder, world):
    """(lengths, targets) of every micro-batch, as the ranks make them."""
    examples = Examples.open(folder, "train")
    sources = [make_source(config, examples, Process(rank=r, world=world)) for r in range(world)]
    train = config.train
    for source in sources:
        steps = source.total_steps(train.steps, train.epochs, train.tokens)
    return [
        ([end - start for start, end in pairwise(batch.cu_seqlens_S)], batch.num_targets)
        for source in sources
        for k in range(1, steps + 1)
        for batch in source.step(k)
    ]


@pytest.mark.parametrize(
    ("world", "train"),
    [
        (1, {"micro_batch_size": 1}),
        (2, {"micro_batch_size": 2}),
        (1, {"micro_batch_size": 1, "steps": 3}),
        (1, {"micro_batch_size": 1, "steps": 30}),
    ],
)
def test_they_are_the_heaviest_of_the_run(prepared, world, train):
    config, folder, facts = prepared
    config = variant(config, world, **train)
    run = rows_of_the_run(config, folder, world)
    memory = RowMemory(pairs=True, prefix=TOKENS)
    found = facts.rows.heaviest(config, read_shape(config.model.path), world, memory)
    for weight in (
        sum,
        lambda lengths: sum(n * (n + TOKENS) for n in lengths),
        lambda lengths: sum(n + TOKENS for n in lengths),
    ):
        assert max(weight(row.lengths) for row in found) == max(weight(row) for row, _ in run)
    assert max(row.supervised for row in found) == max(targets for _, targets in run)
    # Each is a row of the run, as it is there.
    assert {row[:2] for row in found} <= {(tuple(lengths), targets) for lengths, targets in run}


def peak(config, facts, row=None) -> int:
    job = make_job(config, find_machine(config, plans_only=True), facts)
    if row is not None:
        lengths, targets = row
        job = replace(job.with_row(lengths), supervised_share=targets / sum(lengths))
    return max(phase.allocated_bytes for phase in device_phases(job))


@pytest.mark.parametrize(
    ("tuning", "attention"),
    [
        (Full(), Attention.eager),
        (Lora(), Attention.sdpa),
        (Prompt(tokens=TOKENS), Attention.sdpa),
        (Prefix(tokens=TOKENS), Attention.sdpa),
    ],
)
def test_a_plan_is_of_the_row_that_takes_most(prepared, tuning, attention):
    config, folder, facts = prepared
    config = variant(config, tuning=tuning, attention=attention)
    unknown = replace(facts, rows=None)
    planned, bound = peak(config, facts), peak(config, unknown)
    most = max(peak(config, unknown, row) for row in rows_of_the_run(config, folder, 1))
    assert planned == pytest.approx(most, rel=0.002)
    if isinstance(tuning, Prompt):
        assert planned > 1.1 * bound, "short samples bring virtual tokens"
    if attention is Attention.eager:
        assert planned < 0.9 * bound, "and attend to few pairs"


def test_a_row_of_many_samples_is_planned_in_few_groups():
    row = (300, *(40,) * 100, *(3,) * 1000)
    groups = groups_of(row)
    assert sum(groups, ()) == row
    assert groups[0] == (300,) and len(groups) <= 16
    pairs = [sum(n * n for n in group) for group in groups]
    assert max(pairs) <= 300**2
