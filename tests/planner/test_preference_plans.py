"""Plans of objectives that compare answers: their rows, heads, references; against closed forms."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import transformers
from planned_runs import WIDE, planned, wide_model
from preference_runs import pairs_config, write_pairs

from posttrain_dist.build import make_source
from posttrain_dist.config import AutoEngine, AutoTuning, DataConfig, DeepSpeed, Full, Lora, Ray
from posttrain_dist.data.packs.heaviest import RowMemory
from posttrain_dist.data.prepared.arrays import Examples
from posttrain_dist.dist import Process
from posttrain_dist.models.folder import read_shape
from posttrain_dist.objectives.base import Objective
from posttrain_dist.objectives.preference.dpo import Dpo
from posttrain_dist.objectives.preference.kto import Kto
from posttrain_dist.objectives.preference.orpo import Orpo
from posttrain_dist.objectives.preference.reward import Reward
from posttrain_dist.objectives.reference_choice import Reference
from posttrain_dist.objectives.sft import Sft
from posttrain_dist.planner.fallbacks import choose
from posttrain_dist.planner.job import DataFacts, Job, tokens_before
from posttrain_dist.planner.make_job import make_job
from posttrain_dist.planner.make_plan import make_plan
from posttrain_dist.planner.memory.layers.ends import num_targets
from posttrain_dist.planner.memory.layers.row_attention import slots_of
from posttrain_dist.planner.memory.phases import device_phases
from posttrain_dist.planner.plan import Choice, Item, PhaseName, Plan
from posttrain_dist.planner.speed.work import row_keys
from posttrain_dist.prepare import prepare
from posttrain_dist.report.plan.plan_text import plan_text

FACTS = DataFacts(tokens=10**6, supervised=4 * 10**5, longest=900, channels=2, heldout_tokens=10**4)
LENGTHS, PARENTS = (50, 7, 9, 4, 30, 5, 6), (-1, 0, 0, 2, -1, 4, 4)
BEFORE = (0, 50, 50, 59, 0, 30, 30)


def job_of(objective: Objective, facts: DataFacts | None = None, **slots: object) -> Job:
    config, machine = planned(
        tuning=slots.pop("tuning", Full()),
        engine=slots.pop("engine", DeepSpeed(stage=2)),
        objective=objective,
        **slots,  # type: ignore[arg-type]
    )
    return make_job(config, machine, facts)


def plan_of(objective: Objective, facts: DataFacts | None = None, **slots: object) -> Plan:
    return make_plan(job_of(objective, facts, **slots))


def test_each_token_sees_its_path():
    assert tokens_before(LENGTHS, PARENTS) == BEFORE
    job = job_of(Dpo()).with_row(LENGTHS, PARENTS)
    assert job.sample_tokens == 63  # of the longest path
    for window in (None, 8, 55):
        seen = [
            min(before + place + 1, window or math.inf)
            for before, length in zip(BEFORE, LENGTHS, strict=True)
            for place in range(length)
        ]
        assert row_keys(job, window) == pytest.approx(sum(seen) / len(seen))


def test_samples_that_are_planned_together_keep_their_sums():
    lengths, parents = list(LENGTHS), list(PARENTS)
    for _ in range(3):
        parents += [parent if parent < 0 else parent + len(lengths) for parent in PARENTS]
        lengths += LENGTHS
    before = tokens_before(lengths, parents)
    slots = slots_of(lengths, parents, before, prefix_tokens=3)
    paths = [(n, n + b + 3) for n, b in zip(lengths, before, strict=True)]
    assert sum(slot.samples.num_keys for slot in slots) == sum(path for _, path in paths)
    assert sum(slot.samples.num_pairs for slot in slots) == sum(n * path for n, path in paths)
    assert sum(slot.samples.num_tokens for slot in slots) == sum(lengths)
    for slot in slots:  # what a slot follows stands before it, and is what its samples follow
        if slot.parent is not None:
            above = slots[slot.parent].samples
            assert slot.samples.before[0] == above.lengths[0] + above.before[0]


def test_a_pack_without_data_is_a_prompt_and_two_answers():
    dpo, reward = job_of(Dpo()), job_of(Reward())
    for job in (dpo, reward):
        assert job.row_lengths == (1024, 512, 512)
        assert job.row_parents == (-1, 0, 0)
    # Without sharing, the same pair with its prompt twice: 2 x (682 + 341).
    apart = job_of(Dpo(), data=DataConfig(max_length=2048, share_prompt=False))
    assert apart.row_lengths == (1024, 1024) and max(apart.row_parents) < 0
    assert apart.supervised_share == pytest.approx(2 * 341 / 2048)
    assert num_targets(dpo) == 1024
    assert num_targets(reward) == 128  # two, padded as a batch is


@pytest.mark.parametrize("attention", ["varlen", "sdpa", "eager"])
def test_a_shared_prompt_takes_less_than_its_repetition(attention: str):
    job = replace(job_of(Dpo(), tuning=Lora()), attention=attention, supervised_share=0.5)

    def peak(lengths: tuple[int, ...], parents: tuple[int, ...] = ()) -> int:
        return max(p.allocated_bytes for p in device_phases(job.with_row(lengths, parents)))

    alone, tree, paths = (
        peak((1024, 512, 512)),
        peak((1024, 512, 512), (-1, 0, 0)),
        peak((1536, 1536)),
    )
    # The keys of the prompt stand once more for each answer, and the answers' masks.
    assert alone < tree < paths
    keys = 4 * 2 * 2 * 2048 * 8 * 128  # layers, keys and values, bytes, (1024 + 512) x 2 - 1024
    if attention == "varlen":
        assert tree - alone >= keys


def test_rows_of_units_are_the_heaviest_of_the_run(tiny_llama: Path, tmp_path: Path):
    rows = write_pairs(tmp_path / "pairs.jsonl", count=60)
    config = pairs_config(tiny_llama, rows, Dpo(), train={"batch_size": 4, "steps": 6})
    prepare(config, tmp_path / "prepared")
    examples = Examples.open(tmp_path / "prepared", "train")
    source = make_source(config, examples, Process())
    run = []
    for step in range(1, source.total_steps(6) + 1):
        for batch in source.step(step):
            lengths = tuple(end - start for start, end in pairwise(batch.cu_seqlens_S))
            run.append((lengths, batch.num_targets, tuple(batch.parent_S)))
    assert len(run) > 8 and all(min(parents) < 0 <= max(parents) for _, _, parents in run)
    facts = DataFacts.read(tmp_path / "prepared")
    assert facts.rows is not None
    shape = read_shape(config.model.path)
    found = facts.rows.heaviest(config, shape, 1, RowMemory(pairs=True))
    assert {tuple(row) for row in found} <= set(run)

    def pairs(lengths: tuple[int, ...], parents: tuple[int, ...]) -> int:
        before = tokens_before(lengths, parents)
        return sum(n * (n + b) for n, b in zip(lengths, before, strict=True))

    assert max(sum(row.lengths) for row in found) == max(sum(lengths) for lengths, _, _ in run)
    most = max(pairs(lengths, parents) for lengths, _, parents in run)
    assert max(pairs(row.lengths, row.parents) for row in found) == most


def items_of(plan: Plan, name: PhaseName) -> dict[Item, int]:
    return next((phase.items for phase in plan.device.phases if phase.name == name), {})


def test_a_frozen_reference_is_a_second_copy_for_the_whole_run():
    weights = 2 * plan_of(Sft()).parameters
    frozen, passed = (
        plan_of(Dpo(reference=choice)) for choice in (Reference.frozen, Reference.precomputed)
    )
    for phase in frozen.device.phases:
        assert phase.items[Item.reference_model] == weights, phase.name
    assert frozen.device.peak.allocated_bytes == passed.device.peak.allocated_bytes + weights
    assert all(Item.reference_model not in phase.items for phase in passed.device.phases)
    # The pass is before the moments are made, and keeps nothing for a backward.
    pass_bytes = sum(items_of(passed, PhaseName.reference).values())
    assert Item.moments in items_of(passed, PhaseName.update)
    assert pass_bytes < 0.5 * passed.device.peak.allocated_bytes


def test_another_model_takes_its_own_bytes(tmp_path: Path):
    (tmp_path / "config.json").write_text(
        Path(wide_model(), "config.json")
        .read_text(encoding="utf-8")
        .replace('"num_hidden_layers": 4', '"num_hidden_layers": 1'),
        encoding="utf-8",
    )
    small = 2 * (plan_of(Sft(), shape=str(tmp_path)).parameters)
    frozen = plan_of(Dpo(reference=Reference.frozen, reference_model=str(tmp_path)))
    assert frozen.device.peak.items[Item.reference_model] == small
    # Precomputed, it is there for the pass alone.
    passed = plan_of(Dpo(reference=Reference.precomputed, reference_model=str(tmp_path)))
    with_it = [p.name for p in passed.device.phases if Item.reference_model in p.items]
    assert with_it == [PhaseName.reference]
    assert passed.speed.reference_s < plan_of(Dpo()).speed.reference_s


@pytest.mark.parametrize(("tokens", "read"), [(None, 10**6), (2 * 10**5, 2 * 10**5)])
def test_the_pass_writes_a_float_of_each_token(tokens: int | None, read: int):
    config, machine = planned(tuning=Full(), engine=DeepSpeed(stage=2), objective=Dpo())
    config.train.tokens = tokens
    plan = make_plan(make_job(config, machine, FACTS))
    assert plan.reference_bytes == 4 * (read + 10**4)
    assert plan.speed.reference_tokens == read + 10**4
    assert "reference, before step 1" in plan_text(plan.to_json())
    live = plan_of(Dpo(), FACTS, tuning=Lora())
    assert live.reference_bytes == 0 and live.speed.reference_s == 0


def test_a_live_reference_costs_a_third_of_a_step():
    """Forward is a third of forward and backward, and half of those of an adapter."""
    data = {"engine": DeepSpeed(stage=2), "cluster": Ray(workers=1), "gpus": 1}
    passed, frozen = (
        plan_of(Dpo(reference=choice), **data)
        for choice in (Reference.precomputed, Reference.frozen)
    )
    assert passed.speed.terms.get("reference") is None
    passes = passed.speed.step_s - passed.speed.terms["update"]
    assert frozen.speed.terms["reference"] / passes == pytest.approx(1 / 3, rel=0.1)
    assert frozen.speed.step_s - passed.speed.step_s == pytest.approx(
        frozen.speed.terms["reference"], rel=0.01
    )
    # The pass before step 1 goes at the same speed.
    rows = 10**9 / passed.speed.tokens_per_step * 8  # of 8 packs
    assert passed.speed.reference_s == pytest.approx(
        rows * frozen.speed.terms["reference"] / 8, rel=0.01
    )
    # KTO looks at the policy itself, too.
    kto, dpo = (plan_of(each, tuning=Lora(), **data).speed for each in (Kto(), Dpo()))
    assert kto.terms["reference"] == pytest.approx(2 * dpo.terms["reference"], rel=0.01)
    assert "reference" not in plan_of(Orpo(), **data).speed.terms


def test_zero3_gathers_nothing_ahead_behind_a_pass_without_the_adapter():
    slow, fast = (
        plan_of(Dpo(reference=choice), tuning=Lora(), engine=DeepSpeed(stage=3))
        for choice in (Reference.adapter_off, Reference.precomputed)
    )
    assert any("objective.reference=precomputed trains faster" in each for each in slow.warnings)
    assert not any("precomputed" in each for each in fast.warnings)
    rest = slow.speed.step_s - slow.speed.terms["reference"]
    assert rest > 1.1 * fast.speed.step_s


def test_a_reward_model_has_one_row_for_a_head(tmp_path: Path):
    plan = plan_of(Reward())
    with torch.device("meta"):
        model = transformers.LlamaForSequenceClassification(
            transformers.LlamaConfig(**WIDE, num_labels=1)
        )
    assert plan.parameters == sum(each.numel() for each in model.parameters())
    assert plan.export_bytes == 2 * plan.parameters
    tuned = plan_of(Reward(), tuning=Lora(rank=8))
    bare = plan_of(Sft(), tuning=Lora(rank=8))
    assert tuned.trained == bare.trained + 4096  # its head is trained beside the adapter


def chosen(reference: Reference, gib: float) -> Choice:
    config, machine = planned(
        gib=gib, tuning=AutoTuning(), engine=AutoEngine(), objective=Dpo(reference=reference)
    )
    return choose(config, machine, force=True)


def test_the_fallbacks_know_the_reference():
    """A second copy is whole on every rank but for ZeRO-3, which it comes to sooner."""
    copied, passed = (chosen(each, 24.0) for each in (Reference.frozen, Reference.precomputed))
    least = [
        min(t.leanest.device.total_bytes for t in choice.tried[:2] if t.leanest is not None)
        for choice in (copied, passed)
    ]
    between = sum(least) / 2 / 0.96 / 2**30
    assert chosen(Reference.frozen, between).chosen.name == "full ZeRO-3"
    found = chosen(Reference.precomputed, between).chosen
    assert found.name in ("full ZeRO-1", "full ZeRO-2") and found.plan is not None
    assert "a pass over the samples before step 1" in found.plan.settings["reference"]


def test_zero3_shards_the_second_copy():
    plan = plan_of(Dpo(reference=Reference.frozen), engine=DeepSpeed(stage=3))
    held = plan.device.peak.items[Item.reference_model]
    assert held == pytest.approx(2 * plan.parameters / 4, rel=0.001)  # of 4 ranks
