"""Preference objectives against plain PyTorch in float64, and under every cut of a batch."""

from __future__ import annotations

import json
import math
import runpy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from posttrain_kernels import linear_cross_entropy, linear_logprob
from torch.nn.functional import logsigmoid

from posttrain_dist.data.packs.collate import collate, filler
from posttrain_dist.data.prepared.trees import repeat_beginnings
from posttrain_dist.engine import AdamW
from posttrain_dist.engine.single import SingleEngine
from posttrain_dist.errors import DataError
from posttrain_dist.loop import evaluate
from posttrain_dist.metrics.channels import ChannelMeter
from posttrain_dist.models import ModelConfig
from posttrain_dist.models.head import HeadKernels
from posttrain_dist.models.load import load_model
from posttrain_dist.models.policy import Policy
from posttrain_dist.objectives.preference.dpo import Dpo
from posttrain_dist.objectives.preference.kto import Kto
from posttrain_dist.objectives.preference.loss_types import LossType
from posttrain_dist.objectives.reference_choice import Referenced
from posttrain_dist.objectives.sft import Sft

made = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("preferences.py"))))
CPU, CHANNELS = torch.device("cpu"), ["a", "b"]
OBJECTIVES, units_for = made.OBJECTIVES, made.units_for


def plain_pair_loss(name: str, w, l, rw, rl, nw: int, nl: int, m: float):  # noqa: E741
    """The loss of two answers by its formula: w, l log p; rw, rl log ratios; nw, nl tokens."""
    o = OBJECTIVES[name]
    d, log = rw - rl, torch.log

    def s(x):
        return 1 / (1 + torch.exp(-x))

    if name in ("orpo", "simpo"):
        p, q = w / nw, l / nl
        if name == "simpo":
            return -log(s(o.beta * (p - q) - o.gamma - m))
        odds = log(p.exp() / (1 - p.exp())) - log(q.exp() / (1 - q.exp()))
        return -p - o.beta * log(s(odds))
    x, e = o.beta * d - m, o.label_smoothing
    formulas = {
        "sigmoid": lambda: -log(s(x)),
        "sft": lambda: -log(s(x)),
        "smoothed": lambda: -(1 - e) * log(s(x)) - e * log(s(-x)),
        "hinge": lambda: (1 - x).clamp(min=0),
        "ipo": lambda: (rw / nw - rl / nl - 1 / (2 * o.beta)) ** 2,
        "robust": lambda: (-(1 - e) * log(s(x)) + e * log(s(-x))) / (1 - 2 * e),
        "sigmoid_norm": lambda: -log(s(o.beta * (rw / nw - rl / nl) - m)),
        "exo_pair": lambda: s(x) * log(s(x) / (1 - e)) + s(-x) * log(s(-x) / e),
        "sppo_hard": lambda: (rw - 1 / (2 * o.beta)) ** 2 + (rl + 1 / (2 * o.beta)) ** 2,
        "apo_zero": lambda: 1 - s(o.beta * rw) + s(o.beta * rl),
        "apo_down": lambda: s(o.beta * rw) + 1 - s(x),
        "forward_kl": lambda: -log(s(o.beta * (1 / rl.exp() - 1 / rw.exp()))),
        "js": lambda: (
            -log(
                s(
                    o.beta
                    * (log(2 * rw.exp() / (1 + rw.exp())) - log(2 * rl.exp() / (1 + rl.exp())))
                    - m
                )
            )
        ),
        "alpha": lambda: (
            -log(s(o.beta * ((1 - rw.exp() ** -0.2) / 0.2 - (1 - rl.exp() ** -0.2) / 0.2)))
        ),
        "sum": lambda: -0.5 * log(s(x)) + 2 * (rw / nw - rl / nl - 1 / (2 * o.beta)) ** 2,
    }
    return formulas[name]()


def plain_pairs(name: str, model, units) -> torch.Tensor:
    """The loss of a batch, one answer at a time."""
    objective, per_unit, nll, tokens = OBJECTIVES[name], [], 0.0, 0
    for prompt, *answers in units:
        logs = [made.logprob(model, prompt, a) for a in answers]
        sums = [each.sum() for each in logs]
        ratios = [(each - made.reference(a)).sum() for each, a in zip(logs, answers, strict=True)]
        values = [a.extra["value_S"] for a in answers]
        losses = [
            plain_pair_loss(
                name, sums[i], sums[j], ratios[i], ratios[j], len(logs[i]), len(logs[j]),
                answers[i].extra["margin_S"],
            )
            for i in range(len(answers))
            for j in range(len(answers))
            if values[i] > values[j]
        ]  # fmt: skip
        if losses:
            per_unit.append(sum(losses) / len(losses))
            best = values.index(max(values))
            nll, tokens = nll - sums[best], tokens + len(logs[best])
    return sum(per_unit) / len(per_unit) + objective.nll_weight * nll / tokens


def plain_kto(model, units) -> torch.Tensor:
    o, others, losses = OBJECTIVES["kto"], [], []
    for _, *answers in units:
        for a in answers:
            if a.extra["role_S"] == 1:
                gap = made.reference(a, "old_logprob_L") - made.reference(a)
                others.append(float(gap.sum()))
    z0 = max(0.0, sum(others) / len(others))
    for prompt, *answers in units:
        for a in answers:
            if a.extra["role_S"] == 0:
                r = (made.logprob(model, prompt, a) - made.reference(a)).sum()
                good = a.extra["value_S"] == 1
                weight = o.desirable_weight if good else o.undesirable_weight
                sign = 1 if good else -1
                losses.append(weight * (1 - torch.sigmoid(sign * o.beta * (r - z0))))
    return sum(losses) / len(losses)


@pytest.fixture(scope="module")
def policy(tiny_llama):
    model = load_model(
        ModelConfig(path=str(tiny_llama)),
        tiny_llama,
        dtype=torch.float32,
        seed=0,
        materialise=SingleEngine(AdamW(), CPU).materialise(),
    )
    return Policy(model, HeadKernels(linear_cross_entropy, linear_logprob), 2)


@pytest.fixture(scope="module")
def plain(tiny_llama):
    return made.plain_model(tiny_llama)


def gradients(model) -> torch.Tensor:
    """All of them as one vector; they are zeroed."""
    found = torch.cat([p.grad.flatten().double() for p in model.parameters()])
    model.zero_grad()
    return found


def loss_and_gradient(policy, objective, batches) -> tuple[float, torch.Tensor]:
    """Of one step: counted first, then forward and backward of each micro-batch."""
    denominators = made.counted(batches, objective)
    total = 0.0
    for batch in batches:
        objective.check_extra(batch)
        loss = policy(batch, objective, denominators)
        loss.total.backward()
        total += float(loss.total.detach())
    return total, gradients(policy)


@pytest.mark.parametrize("name", ["sigmoid", "ipo", "sft", "orpo", "kto"])
def test_a_prompt_before_each_answer_is_the_same_as_one_for_all(policy, name):
    objective = OBJECTIVES[name]
    units = units_for(name)
    places = [{each.sample_id: i for i, each in enumerate(unit)} for unit in units]
    trees = [
        [replace(each, parent=place.get(each.parent)) for each in unit]
        for unit, place in zip(units, places, strict=True)
    ]
    repeated = [
        [replace(path, unit=unit[0].unit) for path in repeat_beginnings(tree)]
        for unit, tree in zip(units, trees, strict=True)
    ]
    assert all(path.parent is None for unit in repeated for path in unit)
    loss, gradient = loss_and_gradient(policy, objective, [made.batch_of(units)])
    other, wanted = loss_and_gradient(policy, objective, [made.batch_of(repeated)])
    assert loss == pytest.approx(other, rel=2e-6)
    assert float((gradient - wanted).norm()) <= 2e-6 * float(wanted.norm())


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_loss_and_its_gradient_are_those_of_its_formula_in_float64(policy, plain, name):
    units, objective = units_for(name), OBJECTIVES[name]
    wanted = plain_kto(plain, units) if name == "kto" else plain_pairs(name, plain, units)
    wanted.backward()
    reference = gradients(plain)
    loss, gradient = loss_and_gradient(policy, objective, [made.batch_of(units)])
    assert loss == pytest.approx(float(wanted.detach()), rel=2e-6)
    assert float((gradient - reference).norm() / reference.norm()) < 2e-6


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_cut_of_a_batch_changes_neither_loss_nor_gradient(policy, name):
    """Ranks with nothing left run fillers; the sums of `count` are over all of them."""
    units, objective = units_for(name), OBJECTIVES[name]
    whole, gradient = loss_and_gradient(policy, objective, [made.batch_of(units)])
    for ranks, micro in [(1, 1), (2, 4), (3, 2)]:
        batches = [b for rank in made.cut(units, ranks, micro, objective) for b in rank]
        loss, other = loss_and_gradient(policy, objective, batches)
        assert loss == pytest.approx(whole, rel=1e-6), (ranks, micro)
        assert float((other - gradient).norm() / gradient.norm()) < 2e-6, (ranks, micro)


def metrics_of(policy, objective, units) -> dict[str, float]:
    engine = SingleEngine(AdamW(), CPU)
    engine.attach(policy)
    meter = ChannelMeter(CHANNELS, objective, CPU)
    batches = [made.batch_of(units[:2]), made.batch_of(units[2:]), filler(objective)]
    return meter.eval_metrics(evaluate(engine, batches, objective, meter))


def test_metrics_are_means_over_comparisons_by_channel(policy, plain):
    units, beta = [made.unit(i, made.PAIR, i % 2) for i in range(1, 6)], 0.3
    metrics = metrics_of(policy, Dpo(beta=beta), units)
    rows = []
    for prompt, chosen, rejected in units:
        w, l = (made.logprob(plain, prompt, a).detach() for a in (chosen, rejected))  # noqa: E741
        rewards = [
            beta * float((p - made.reference(a)).sum()) for p, a in ((w, chosen), (l, rejected))
        ]
        margin = rewards[0] - rewards[1]
        rows.append(
            {
                "margin": margin,
                "accuracy": margin > 0,
                "raw_accuracy": w.sum() > l.sum(),
                "chosen_logprob": w.sum(),
                "rejected_logprob": l.sum(),
                "chosen_reward": rewards[0],
                "chosen_logratio": rewards[0] / beta,
                "rejected_reward": rewards[1],
                "chosen_tokens": len(w),
                "rejected_tokens": len(l),
                "loss": math.log1p(math.exp(-margin)),
            }
        )
    own = {name for name in metrics if "dpo" in name}
    names = rows[0].keys() - {"loss"}
    assert own == {"eval_dpo/sft_loss"} | {f"eval_dpo_channel_sft_loss/{c}" for c in CHANNELS} | {
        f"eval_dpo/{n}" for n in names
    } | {f"eval_dpo_channel_{n}/{c}" for n in names for c in CHANNELS}
    assert 0 < metrics["eval_dpo/accuracy"] < 1
    for name in rows[0]:
        key = "eval_dpo" if name != "loss" else "eval"
        values = [float(row[name]) for row in rows]
        assert metrics[f"{key}/{name}"] == pytest.approx(sum(values) / 5, rel=1e-5), name
        by_channel = {"a": values[1::2], "b": values[::2]}
        for channel, mine in by_channel.items():
            found = metrics[f"{key}_channel_{name}/{channel}"]
            assert found == pytest.approx(sum(mine) / len(mine), rel=1e-5), (name, channel)
    nll = [-float(row["chosen_logprob"]) for row in rows]
    tokens = sum(row["chosen_tokens"] for row in rows)
    assert metrics["eval_dpo/sft_loss"] == pytest.approx(sum(nll) / tokens, rel=1e-5)


def test_swapping_the_answers_negates_the_margin(policy):
    units = [made.unit(i, made.PAIR) for i in range(1, 5)]
    there = metrics_of(policy, Dpo(), units)
    back = metrics_of(policy, Dpo(), [made.swapped(each) for each in units])
    assert there["eval_dpo/margin"] == pytest.approx(-back["eval_dpo/margin"], rel=1e-9) != 0
    assert there["eval_dpo/accuracy"] == 1 - back["eval_dpo/accuracy"]
    assert there["eval_dpo/chosen_logprob"] == back["eval_dpo/rejected_logprob"]


@pytest.mark.parametrize("name", [n for n, o in OBJECTIVES.items() if isinstance(o, Referenced)])
def test_a_policy_that_is_its_reference_has_margin_0_and_the_loss_of_the_start(policy, name):
    """Bit for bit: the log-probabilities of the reference are subtracted token by token."""
    objective, batch = OBJECTIVES[name], made.batch_of(units_for(name))
    with torch.no_grad():
        own_N = policy.head.logprob(policy.hidden(batch), batch.labels_N).logprob_N
        batch.extra |= {"ref_logprob_N": own_N, "old_logprob_N": own_N}
        found = policy(batch, objective, made.counted([batch], objective))
    columns = [column.name for column in objective.columns]
    table = dict(zip(columns, found.channels_CK.sum(0).tolist(), strict=True))
    assert table["margin"] == table["accuracy"] == 0.0
    start = objective.start_loss(batch)
    assert float(found.total) == pytest.approx(start, rel=1e-6)
    if name == "sigmoid":
        margin = math.log1p(math.exp(0.7))  # of one pair of four
        assert start == pytest.approx((3 * math.log(2) + margin) / 4)
    assert objective.start_loss(filler(objective)) is None


def test_for_a_small_beta_the_gradient_is_the_difference_of_the_sft_gradients(policy):
    """-beta / 2 (grad log p(chosen) - grad log p(rejected)), of which Sft knows each."""
    each = made.unit(3, made.PAIR)
    beta = 1e-4
    _, gradient = loss_and_gradient(policy, Dpo(beta=beta), [made.batch_of([each])])
    prompt, *answers = each
    sft = []
    for answer in answers:
        batch = collate([prompt, answer])
        policy(batch, Sft(), Sft().count(batch)).total.backward()
        sft.append(gradients(policy) * batch.weight_sum)
    wanted = beta / 2 * (sft[0] - sft[1])
    assert float((gradient - wanted).norm() / wanted.norm()) < 5e-3  # s(beta d) is not quite 1 / 2
    halved = loss_and_gradient(policy, Dpo(beta=beta / 10), [made.batch_of([each])])[1]
    assert float((halved * 10 - wanted).norm() / wanted.norm()) < 5e-4


def test_packed_is_padded_is_one_by_one(policy, tiny_llama):
    """The same pairs by transformers on a padded batch, each answer with its own prompt."""
    import transformers

    units, beta = [made.unit(i, made.PAIR) for i in range(1, 5)], 0.3
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_llama)
    rows = [(p, a) for p, *answers in units for a in answers]
    ids = [torch.tensor([*p.input_ids_L, *a.input_ids_L]).long() for p, a in rows]
    padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
    lengths = torch.tensor([len(each) for each in ids])
    mask = torch.arange(padded.shape[1]) < lengths[:, None]
    logits = model(input_ids=padded, attention_mask=mask.long()).logits[:, :-1].log_softmax(-1)
    each = logits.gather(2, padded[:, 1:, None])[..., 0]
    first = torch.tensor([len(p.input_ids_L) for p, _ in rows])
    place = torch.arange(1, padded.shape[1])
    answer = (place >= first[:, None]) & (place < lengths[:, None])
    ratio = (each * answer).sum(1) - torch.stack([made.reference(a).sum() for _, a in rows])
    loss = -logsigmoid(beta * (ratio[::2] - ratio[1::2])).mean()
    loss.backward()
    wanted = gradients(model)
    packed, gradient = loss_and_gradient(policy, Dpo(beta=beta), [made.batch_of(units)])
    alone, other = loss_and_gradient(policy, Dpo(beta=beta), [made.batch_of([u]) for u in units])
    assert packed == pytest.approx(float(loss.detach()), rel=2e-6)
    assert alone == pytest.approx(packed, rel=2e-6)
    assert float((gradient - wanted).norm() / wanted.norm()) < 2e-6
    assert float((other - wanted).norm() / wanted.norm()) < 2e-6


def test_kto_is_evaluated_about_the_z0_of_all_held_out_rows(policy, plain):
    units = units_for("kto")
    metrics = metrics_of(policy, OBJECTIVES["kto"], units)
    assert metrics["eval/loss"] == pytest.approx(float(plain_kto(plain, units).detach()), rel=2e-6)
    assert metrics["eval_kto/kl"] > 1  # so that a z0 of 0 gives another loss
    turned = [[p, *(made.swapped([p, a])[1] for a in rest)] for p, *rest in units]
    # 1 becomes -1 and 0 stays: every answer is bad.
    assert metrics_of(policy, Kto(), turned).keys() == {
        key for key in metrics if "_desirable" not in key and "/desirable" not in key
    }


def test_a_margin_that_a_loss_would_ignore_is_refused():
    batch = made.batch_of([made.unit(1, made.PAIR_WITH_MARGIN)])
    Dpo().check_extra(batch)
    with pytest.raises(DataError, match=r"sample 101: has a margin, which ipo has no place for"):
        Dpo(loss_type=LossType.ipo).check_extra(batch)


def test_special_tokens_are_measured_on_the_better_answers_alone(policy):
    batch = made.batch_of([made.unit(1, made.PAIR), made.unit(2, made.RANKING)])
    found = policy(batch, Dpo(), made.counted([batch], Dpo()))
    better = torch.tensor([i in (1, 4) for i in batch.sample_N.tolist()])
    better[batch.num_targets :] = False
    assert torch.equal(found.counted_N.bool(), better) and 0 < int(better.sum()) < batch.num_targets


SAMPLED = ("sft", "kto", "orpo")
EVERY = [
    pytest.param(stage, world, tuple(OBJECTIVES), marks=pytest.mark.slow, id=f"zero{stage}-{world}")
    for stage in range(4)
    for world in (1, 2, 3)
]


@pytest.mark.parametrize(
    ("stage", "world", "names"), [pytest.param(3, 2, SAMPLED, id="sampled"), *EVERY]
)
def test_ranks_and_shards_change_neither_loss_nor_gradient(
    policy, tiny_llama, run_workers, stage, world, names
):
    """Each objective on real processes; with three ranks one of them runs a filler."""
    engine = SingleEngine(AdamW(), CPU)
    engine.attach(policy)
    wanted = made.first_steps(engine, names)
    (output, *_) = run_workers("step_preferences.py", world, tiny_llama, stage, *names)
    found = json.loads(output.split("FIRST STEPS ")[1].splitlines()[0])
    assert tuple(found) == names
    for name, (loss, norm) in wanted.items():
        assert found[name] == pytest.approx([loss, norm], rel=2e-5), name
